"""Condition number of the neural tangent kernel of the blocks: how trainable a depth is. Lower is better.

Theta = G G^T over N samples, G_i = gradient of a fixed random projection of sample i's output with respect
to the block weights; kappa = lambda_max / lambda_min (EntPruner, arXiv 2511.21122; TE-NAS, arXiv 2102.11535).
G is never formed: the N x N matrix is summed up layer by layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.walk import backward_walk

CHUNK_NUMBERS = 2**25
"""Most float64 numbers of a temporary (256 MiB)."""


@dataclass(frozen=True)
class NTKScore:
    """Condition numbers of the repeats; None is an invalid one."""

    median: float | None
    """Median of the valid repeats; None when they are not a majority."""
    repeats: list[float | None]


def ntk_score(
    parts: Parts,
    kept_blocks: Sequence[int],
    draw: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    projection: Callable[[int, tuple[int, ...]], Tensor],
    repeats: int,
) -> NTKScore:
    """Condition number of several repeats, equal on all ranks. Collective: all ranks call.

    Repeat r is computed whole on rank r mod world size. Ranks without a repeat of their own in the last
    round compute one again and drop it, so that all ranks ask for the same blocks.

    Args:
        parts: the model.
        kept_blocks: original indices of the candidate's blocks, sorted.
        draw: repeat -> (z_t (N,C,H,W), t (N,), labels (N,)); the same draws for every candidate.
        projection: (repeat, (C,H,W)) -> tensor of that shape; the same for all samples.
        repeats: number of repeats.

    Raises:
        DistributedError: on all ranks, when an activation or a gradient is not finite, naming block and repeat.
    """
    world, mine = comm.world_size(), {}
    for first in range(0, repeats, world):
        own = first + comm.rank() % world
        repeat = min(own, repeats - 1)
        gram, problem = _walk(parts, kept_blocks, *draw(repeat), _project(projection, repeat))
        if own == repeat:
            mine[str(repeat)] = condition_number(gram), problem
    gathered = {repeat: found for part in comm.all_gather_json(mine) for repeat, found in part.items()}
    kappas, problems = zip(*(gathered[str(r)] for r in range(repeats)), strict=True)
    bad = [f"NTK repeat {r} of depth {len(kept_blocks)}: {problem}" for r, problem in enumerate(problems) if problem]
    if bad:
        raise comm.DistributedError(f"{bad[0]}. Nothing was removed.")
    valid = [kappa for kappa in kappas if kappa is not None]
    return NTKScore(statistics.median(valid) if 2 * len(valid) > repeats else None, list(kappas))


def _project(projection: Callable[[int, tuple[int, ...]], Tensor], repeat: int) -> Callable[[Tensor], Tensor]:
    """Gradient of sum_i <projection, prediction_i> with respect to the predictions (N,C,H,W)."""
    return lambda prediction: projection(repeat, tuple(prediction.shape[1:])).to(prediction).expand_as(prediction)


def ntk_gram(
    parts: Parts,
    kept_blocks: Sequence[int],
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    output_gradient: Callable[[Tensor], Tensor],
) -> Tensor:
    """Gram matrix (N,N) float64 of the per-sample gradients of all linear weights and biases of the blocks."""
    return _walk(parts, kept_blocks, z_t, t, labels, output_gradient)[0]


def _walk(
    parts: Parts, kept_blocks: Sequence[int], z_t: Tensor, t: Tensor, labels: Tensor,
    output_gradient: Callable[[Tensor], Tensor],
) -> tuple[Tensor, str]:  # fmt: skip
    """The Gram matrix, and what is not finite on the way: the first block in the model with such an activation."""
    gram = torch.zeros(len(z_t), len(z_t), dtype=torch.float64, device=parts.device)
    problem = ""
    for index, records in backward_walk(parts, kept_blocks, z_t, t, labels, output_gradient):
        for activation, gradient, module in records.values():
            gram += layer_gram(activation, gradient, has_bias=module.bias is not None)
            if not torch.isfinite(activation).all():
                problem = f"block {index} has NaN or infinite activations"
            elif not problem and not torch.isfinite(gradient).all():
                problem = f"block {index} has NaN or infinite gradients"
    return gram, problem


def layer_gram(a: Tensor, g: Tensor, has_bias: bool, formula: str | None = None, chunk: int = CHUNK_NUMBERS) -> Tensor:
    """One linear layer's share of the Gram matrix, (N,N) float64.

    Args:
        a: inputs (N,T,d_in); g: output gradients (N,T,d_out).
        has_bias: whether the layer has a bias, which adds <sum_t g_i, sum_t g_j>.
        formula: "pairs", sum over token pairs of <a_i, a_j><g_i, g_j>, N^2 T^2 (d_in + d_out) operations; "gradients",
            explicit per-sample gradients, N (T + N) d_in d_out operations; None takes the cheaper.
        chunk: most numbers of a temporary.
    """
    a, g = a.double(), g.double()
    samples, tokens, d_in = a.shape
    d_out = g.shape[2]
    if formula is None:
        pairs_cost, gradients_cost = samples * tokens**2 * (d_in + d_out), (tokens + samples) * d_in * d_out
        formula = "pairs" if pairs_cost <= gradients_cost else "gradients"
    gram = {"pairs": _gram_of_pairs, "gradients": _gram_of_gradients}[formula](a, g, chunk)
    if has_bias:
        bias = g.sum(1)  # (N,d_out)
        gram += bias @ bias.T
    return gram


def _gram_of_pairs(a: Tensor, g: Tensor, chunk: int) -> Tensor:
    samples, tokens = a.shape[:2]
    all_a, all_g = a.flatten(0, 1), g.flatten(0, 1)  # (N*T,d)
    rows = max(1, chunk // (tokens * samples * tokens))
    parts = []
    for some_a, some_g in zip(a.split(rows), g.split(rows), strict=True):
        products = (some_a.flatten(0, 1) @ all_a.T) * (some_g.flatten(0, 1) @ all_g.T)  # (n*T,N*T)
        parts.append(products.view(-1, tokens, samples, tokens).sum((1, 3)))
    return torch.cat(parts)


def _gram_of_gradients(a: Tensor, g: Tensor, chunk: int) -> Tensor:
    samples, d_in = a.shape[0], a.shape[2]
    gram = a.new_zeros(samples, samples)
    for some_g in g.split(max(1, chunk // (samples * d_in)), dim=2):
        gradients = (some_g.transpose(1, 2) @ a).flatten(1)  # (N, n*d_in)
        gram += gradients @ gradients.T
    return gram


def condition_number(gram: Tensor) -> float | None:
    """lambda_max / lambda_min of a Gram matrix (N,N) float64; None when it is invalid.

    Invalid are numbers that are not finite and a smallest eigenvalue that is not above rounding level,
    N * eps * lambda_max: a singular kernel must never win.
    """
    if not torch.isfinite(gram).all():
        return None
    eigenvalues = torch.linalg.eigvalsh((gram + gram.T) / 2)  # ascending
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    if smallest <= torch.finfo(torch.float64).eps * len(gram) * largest:
        return None
    kappa = largest / smallest
    return kappa if math.isfinite(kappa) else None
