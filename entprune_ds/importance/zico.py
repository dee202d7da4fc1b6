"""ZiCo: how steady the gradients of the blocks are over batches, a sign of fast convergence. Higher is better.

Sum over linear layers of log( sum over weights of mean_b |g_b| / std_b(g_b) ), g_b the gradient of the loss on
batch b (Li et al., ZiCo, arXiv 2301.11300, eq. 7). The sum grows with the number of layers and so always prefers
the deeper model: the mean over layers is the default score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.sweep_statistics import LossFn
from entprune_ds.importance.walk import LinearRecord, backward_walk

Draw = tuple[Tensor, Tensor, Tensor, Tensor]
"""z_t (N,C,H,W), t (N,), labels (N,) i64, target (N,...) of the objective."""

ZERO_SPREAD = 1e-12
"""Relative spread over the batches that counts as none: rounding of float64, not noise of the data."""


@dataclass(frozen=True)
class ZiCoScore:
    """ZiCo over the linear layers of a candidate; None when no gradient has a spread."""

    mean: float | None
    """Mean over the layers that have a weight with spread."""
    total: float | None
    """Sum over the same layers."""
    skipped: int
    """Weights left out because their gradient has no spread over the batches."""


def zico_score(
    parts: Parts,
    kept_blocks: Sequence[int],
    draw: Callable[[int], Draw],
    loss_fn: LossFn,
    num_batches: int,
    batches_per_walk: int | None = None,
) -> ZiCoScore:
    """ZiCo over B fixed batches, equal on all ranks. Collective: all ranks call.

    Batch b is computed on rank b mod world size; a rank with fewer batches computes one again with weight 0,
    so that all ranks ask for the same blocks. Gradients and sums over ranks are formed one layer at a time.

    Args:
        parts: the model.
        kept_blocks: original indices of the candidate's blocks, sorted.
        draw: batch -> Draw, of the same size for every batch and the same for every candidate.
        loss_fn: (prediction, target, t) -> loss per example (N,); called in float64.
        num_batches: B, at least 2.
        batches_per_walk: bounds memory: most batches of this rank that go through a block together; None means all.
            Every further walk asks for the blocks once more.

    Raises:
        ValueError: for fewer than 2 batches.
        DistributedError: on all ranks, when a gradient is not finite, naming block, layer and batch.
    """
    if num_batches < 2:
        raise ValueError(f"ZiCo needs a spread over at least 2 batches, got {num_batches}.")
    world = comm.world_size()
    batches = range(comm.rank() % world, -(-num_batches // world) * world, world)
    counted = [b for b in batches if b < num_batches]
    padded = [min(b, num_batches - 1) for b in batches]
    step = batches_per_walk or len(padded)
    chunks = [[draw(b) for b in padded[i : i + step]] for i in range(0, len(padded), step)]
    walks = [_walk(parts, kept_blocks, chunk, loss_fn) for chunk in chunks]
    logs: list[float] = []
    skipped = 0
    for records_of_walks in zip(*walks, strict=True):
        for name in records_of_walks[0]:
            of_walks = zip(chunks, records_of_walks, strict=True)
            gradients = [g for chunk, records in of_walks for g in _gradients(records[name], len(chunk))]
            ratio, without_spread = _layer_ratio(gradients, len(counted), num_batches)
            if not math.isfinite(ratio):
                _raise_not_finite(name, dict(zip(counted, gradients, strict=False)))
            skipped += without_spread
            if ratio != 0.0:  # a layer in which no weight has a spread says nothing
                logs.append(math.log(ratio))
    total = math.fsum(logs) if logs else None
    return ZiCoScore(None if total is None else total / len(logs), total, skipped)


def _raise_not_finite(name: str, gradients: dict[int, Tensor]) -> None:
    """Raise an error that names the layer and the batch. Collective."""
    bad = [batch for batch, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    found = [batch for part in comm.all_gather_json(bad) for batch in part]
    block, _, layer = name.partition(".")
    where = f"ZiCo batch {min(found)}" if found else "the sums over the ZiCo batches"
    text = f"the gradient of layer {layer} of block {block} is NaN or infinite in {where}. Nothing was removed."
    raise comm.DistributedError(text)


def _walk(parts: Parts, kept_blocks: Sequence[int], draws: list[Draw], loss_fn: LossFn):
    """Backward walk of several batches at once; yields {layer name: LinearRecord} per block."""
    z_t, t, labels, target = (torch.cat(tensors) for tensors in zip(*draws, strict=True))

    def output_gradient(prediction: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = prediction.double().requires_grad_()
            losses = loss_fn(leaf, target.to(leaf), t)
            size = len(prediction) // len(draws)
            return torch.autograd.grad(losses.sum() / size, leaf)[0].to(prediction)  # mean loss of each batch

    for index, records in backward_walk(parts, kept_blocks, z_t, t, labels, output_gradient):
        yield {f"{index}.{name}": record for name, record in records.items()}


def _gradients(record: LinearRecord, num_batches: int) -> list[Tensor]:
    """Weight gradient (d_out,d_in) float64 of each of the batches that went through together."""
    pairs = zip(record.activation.chunk(num_batches), record.gradient.chunk(num_batches), strict=True)
    return [g.double().flatten(0, 1).T @ a.double().flatten(0, 1) for a, g in pairs]


def _layer_ratio(gradients: list[Tensor], num_counted: int, num_batches: int) -> tuple[float, int]:
    """Sum over a layer's weights of mean|g| / std(g) over all ranks' batches, and those without spread. Collective.

    Only the first `num_counted` gradients count; the rest is padding. |g| is summed apart from g (the absolute
    value of a sum is not the sum of absolute values), and the squares are taken around the mean, because the
    difference E[g^2] - E[g]^2 would cancel.
    """
    gradients, like = gradients[:num_counted], gradients[0]

    def over_ranks(values: Iterable[Tensor]) -> Tensor:
        return comm.all_reduce_sum(sum(values, torch.zeros_like(like)))  # new zeros: a rank may have nothing to add

    mean = over_ranks(gradients) / num_batches
    mean_abs = over_ranks(g.abs() for g in gradients) / num_batches
    squares = over_ranks((g - mean).square() for g in gradients)
    std = (squares / num_batches).sqrt()
    if not torch.isfinite(std).all():
        return math.nan, 0
    spread = std > ZERO_SPREAD * mean_abs
    return (mean_abs[spread] / std[spread]).sum().item(), int((~spread).sum().item())
