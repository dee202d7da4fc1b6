"""The adaptive ODE sampler: Dormand & Prince's pair of orders 5 and 4, with a step size for each image.

torchdiffeq, which the official SiT code uses, chooses one step for the whole batch, so an image would depend on its
neighbours and on the number of ranks. Formulas and step control are torchdiffeq's; one image alone comes out as there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entprune_ds.diffusion.interpolant import expand
from entprune_ds.diffusion.samplers import Velocity

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (
        35 / 384,
        0.0,
        500 / 1113,
        125 / 192,
        -2187 / 6784,
        11 / 84,
    ),  # the fifth-order solution: its slope starts the next
)
FOURTH_ORDER = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
ERROR = tuple(b - b4 for b, b4 in zip((*STAGES[-1], 0.0), FOURTH_ORDER, strict=True))
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


@torch.no_grad()
def dopri5(
    velocity: Velocity, noise: Tensor, labels: Tensor, *, start: float, end: float, atol: float, rtol: float,
    anyone: Callable[[bool], bool] = bool,
) -> Tensor:  # fmt: skip
    """Integrate each image with steps whose error stays below atol + rtol |z| (root mean square over the image).

    All images are evaluated together until the last one arrives. An image whose steps shrink to nothing, or whose
    velocity is not finite, ends as NaN.

    Args:
        velocity: (z (N,C,H,W), t (N,), labels (N,)) -> (N,C,H,W).
        noise: start (N,C,H,W).
        labels: (N,) i64.
        start, end: times.
        atol, rtol: tolerances.
        anyone: whether any image is left on any rank, from whether one is left here; where evaluations are
            collective, all ranks then make the same number of them.
    """
    z, t = noise, torch.full((len(noise),), start, dtype=torch.float64, device=noise.device)

    def slope(z: Tensor, t: Tensor) -> Tensor:
        return velocity(z, t.to(torch.promote_types(z.dtype, torch.float32)), labels)

    first = slope(z, t)
    step = _first_step(slope, z, t, first, atol, rtol)  # (N,) f64
    while anyone(bool((t < end).any())):
        taken = torch.minimum(step, end - t)  # 0 for those that have arrived
        slopes = [first]
        for node, weights in zip(NODES, STAGES, strict=True):
            moved = z + _sum(slopes, weights, taken)
            slopes.append(slope(moved, t + node * taken))
        ratio = _norm(_sum(slopes, ERROR, taken) / (atol + rtol * torch.maximum(z.abs(), moved.abs())))
        arrived = t >= end
        failed = ~arrived & ~(torch.isfinite(ratio) & (t + taken > t))
        accepted = (ratio <= 1) & ~arrived
        t = torch.where(accepted, torch.where(step >= end - t, end, t + taken), t)
        z = torch.where(expand(accepted, z), moved, z)
        first = torch.where(expand(accepted, z), slopes[-1], first)
        step = torch.where(arrived, step, taken * _growth(ratio))
        t, z = torch.where(failed, end, t), torch.where(expand(failed, z), torch.nan, z)
    return z


def _sum(slopes: list[Tensor], weights: tuple[float, ...], step: Tensor) -> Tensor:
    """step (N,) * sum_i weights_i slopes_i, (N,C,H,W)."""
    factor = expand(step, slopes[0]).to(slopes[0].dtype)
    return factor * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)


def _norm(x: Tensor) -> Tensor:
    """Root mean square of each image, (N,C,H,W) -> (N,) f64."""
    return x.double().square().flatten(1).mean(1).sqrt()


def _growth(ratio: Tensor) -> Tensor:
    """Factor of the next step from the error over its tolerance, (N,); an accepted step never shrinks it."""
    least = torch.where(ratio < 1, 1.0, SHRINK)
    return torch.clamp(SAFETY / ratio.clamp(min=1e-30) ** 0.2, max=GROW).maximum(least)


def _first_step(
    slope: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor, first: Tensor, atol: float, rtol: float
) -> Tensor:
    """Starting step of each image, (N,) f64 (Hairer, Norsett, Wanner, Solving ODEs I, sec. II.4)."""
    scale = atol + rtol * z.abs()
    d0, d1 = _norm(z / scale), _norm(first / scale)
    guess = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    second = slope(z + expand(guess, z).to(z.dtype) * first, t + guess)
    d2 = _norm((second - first) / scale) / guess
    steepest = torch.maximum(d1, d2)
    by_slope = torch.where(steepest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * guess, by_slope)
