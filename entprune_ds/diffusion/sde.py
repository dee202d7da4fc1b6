"""SDE sampler of flow models: dz = (v + w score) dt + sqrt(2 w) dW (SiT, arXiv 2401.08740, eq. 10, table 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from entprune_ds.diffusion.interpolant import Coefficients, Path, expand
from entprune_ds.diffusion.prediction import score_of, velocity_of
from entprune_ds.diffusion.samplers import Velocity, times

NoiseAt = Callable[[int], Tensor]
"""noise_at(step) -> standard normal noise (N,C,H,W) of a sampler step, every image from its own stream."""


def diffusion_coefficient(form: str, norm: float, c: Coefficients, t: Tensor) -> Tensor:
    """w(t), at least 0, of the shape of t; c are the coefficients at t.

    Args:
        form: constant, sbdm (that of score-based diffusion models), sigma, linear, decreasing or
            increasing-decreasing.
        norm: its factor; inside the square of `decreasing`, as in the official code.

    Raises:
        ValueError: unknown form.
    """
    forms: dict[str, Callable[[], Tensor]] = {
        "constant": lambda: norm * torch.ones_like(t),
        "sbdm": lambda: norm * c.score_factor,
        "sigma": lambda: norm * c.sigma,
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": lambda: norm * torch.sin(math.pi * t) ** 2,
    }
    if form not in forms:
        raise ValueError(f"the diffusion form must be one of {', '.join(forms)}, got {form!r}.")
    return forms[form]()


@torch.no_grad()
def euler_maruyama(
    predict: Velocity, noise: Tensor, labels: Tensor, noise_at: NoiseAt, *, path: Path, prediction: str,
    num_steps: int, start: float, end: float, form: str, norm: float, last_step: str, last_step_size: float,
) -> Tensor:  # fmt: skip
    """Euler-Maruyama in equal steps over [start, end], then one last step without noise.

    Args:
        predict: (z (N,C,H,W), t (N,), labels (N,)) -> prediction (N,C,H,W).
        noise: start (N,C,H,W).
        labels: (N,) i64.
        noise_at: noise of each step.
        path, prediction: what the model was trained on.
        num_steps: evaluations of the model, the last step among them.
        form, norm: see `diffusion_coefficient`.
        last_step: none, mean (drift of the SDE), tweedie (expected data) or euler (drift of the ODE).
        last_step_size: its size; end + size = 1.

    Raises:
        ValueError: unknown form or last step.
    """

    def terms(z: Tensor, t: Tensor) -> tuple[Coefficients, Tensor, Tensor, Tensor]:
        """Coefficients and w (N,1,1,1), velocity and score (N,C,H,W), from one evaluation."""
        wide = expand(t, z)
        c, output = path.at(wide), predict(z, t, labels)
        w = diffusion_coefficient(form, norm, c, wide)
        return c, w, velocity_of(prediction, c, z, output), score_of(prediction, c, z, output)

    z, steps = noise, num_steps - (last_step != "none")
    for number, (now, then) in enumerate(pairwise(times(steps, noise, start, end))):
        _, w, velocity, score = terms(z, now.expand(len(z)))
        step = then - now
        z = z + step * (velocity + w * score) + (2 * w * step).sqrt() * noise_at(number).to(z)
    if last_step == "none":
        return z
    c, w, velocity, score = terms(z, torch.full((len(z),), end, device=z.device, dtype=times(1, z).dtype))
    if last_step == "mean":
        return z + last_step_size * (velocity + w * score)
    if last_step == "tweedie":
        return (z + c.sigma**2 * score) / c.alpha
    if last_step == "euler":
        return z + last_step_size * velocity
    raise ValueError(f"the last step must be none, mean, tweedie or euler, got {last_step!r}.")
