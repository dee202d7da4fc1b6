"""Taylor scores: what the loss changes to first order when every weight of a block goes to 0.

    score of a block = sum over its weights and biases w of | w * g(w) |

with g the gradient of a loss that is averaged over the draws BEFORE the absolute value is taken (Molchanov et al.,
arXiv 1906.10771; for whole blocks Kim et al., arXiv 2402.02834). Criterion taylor takes the training loss, diff_pruning
the sum of the losses at those times t that are not nearly solved (Diff-Pruning, Fang et al., arXiv 2305.10924).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.importance.finite import raise_not_finite
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.scores import Score, Scores
from entprune_ds.importance.walk import LinearRecord, backward_walk

Weigh = Callable[[Tensor], Tensor]
"""Mean losses (B,) of the B places of a batch -> the weight (B,) with which each counts in the loss."""


def measure_taylor(m: Measuring) -> Scores:
    """Taylor score of the mean loss, over t as in training or at the times score.taylor_t. Collective.

    Raises:
        DistributedError: on all ranks, when a loss or a gradient is not finite, naming the block.
        ValueError: when the model gives no gradients.
    """
    score = m.config.score
    size = score.gradient_batch_size
    chosen = torch.tensor(score.taylor_t, dtype=torch.float64)
    t = chosen.repeat(size // len(chosen)) if score.taylor_t else None  # a multiple: checked with the config
    return {"taylor": _measure(m, "taylor", t, lambda losses: torch.full_like(losses, 1 / size))}


def measure_diff_pruning(m: Measuring) -> Scores:
    """Taylor score of the sum of L_t over the times with L_t > score.diff_pruning_threshold * L_max. Collective.

    The times are evenly spaced, as many as a gradient batch has draws; each draw is another example. The authors' loop
    walks up from the clean end and stops at the first time that falls under the threshold. That is this set where L_t
    falls along t, as that of noise prediction does; a velocity loss has no such side.

    Raises:
        DistributedError: on all ranks, when a loss or a gradient is not finite, naming the block.
        ValueError: when the model gives no gradients.
    """
    size, threshold = m.config.score.gradient_batch_size, m.config.score.diff_pruning_threshold
    t = (torch.arange(size, dtype=torch.float64) + 0.5) / size

    def unsolved(losses: Tensor) -> Tensor:
        return (losses > threshold * losses.max()).to(losses)

    return {"diff_pruning": _measure(m, "diff_pruning", t, unsolved)}


def _measure(m: Measuring, purpose: str, t: Tensor | None, weigh: Weigh) -> dict[int, Score]:
    """Scores over the fixed batches, equal on all ranks, with jackknife standard errors over them. Collective.

    Batch b is computed whole on rank b mod world size; a rank with fewer batches computes the last one again and does
    not count it, so that all ranks ask for the same blocks. Gradients are summed over ranks one layer at a time.
    """
    count, size, world = m.config.score.gradient_batches, m.config.score.gradient_batch_size, comm.world_size()
    batches = [m.draw(purpose, size, t) for _ in range(count)]
    own = range(comm.rank() % world, -(-count // world) * world, world)
    counted = sum(b < count for b in own)
    mine = Batch(*(torch.cat(columns) for columns in zip(*(batches[min(b, count - 1)] for b in own), strict=True)))

    def output_gradient(prediction: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = prediction.double().requires_grad_()
            losses = m.loss_fn(leaf, mine.target.to(leaf), mine.t).view(-1, size)
            means = comm.all_reduce_sum(losses.detach()[:counted].sum(0)) / count
            if not torch.isfinite(means).all():
                raise_not_finite(m, mine, lambda draw: f"gradient batch {own[draw // size]}")
            return torch.autograd.grad((losses * weigh(means) / count).sum(), leaf)[0].to(prediction)

    scores = {}
    for index, records in backward_walk(m.parts, m.kept_blocks, mine.z_t, mine.t, mine.labels, output_gradient):
        value, without = _block_score(records.values(), len(own), counted, count)
        if not math.isfinite(value):
            text = f"check {m.check}: the {purpose} gradient of block {index} is NaN or infinite."
            raise comm.DistributedError(f"{text} Nothing was removed.")  # the same on all ranks: it is reduced
        scores[index] = Score(value, math.sqrt((count - 1) * statistics.pvariance(without)))  # Efron & Stein 1981
    return {index: scores[index] for index in m.kept_blocks}


def _block_score(
    records: Iterable[LinearRecord], num_batches: int, counted: int, count: int
) -> tuple[float, list[float]]:
    """sum |w g| of a block over all batches, and without each of them in turn (count,). Collective."""
    value, without = 0.0, torch.zeros(num_batches, dtype=torch.float64)
    for record in records:
        weights = _columns(record.module)
        gradients = _gradients(record, num_batches)[:counted]
        total = comm.all_reduce_sum(sum(gradients, torch.zeros_like(weights)))
        value += (total * weights).abs().sum().item()
        for i, gradient in enumerate(gradients):
            without[i] += ((total - gradient) * weights).abs().sum().item() * count / (count - 1)
    of_ranks = comm.all_gather(without.to(comm.device()))
    return value, torch.stack(of_ranks, dim=1).flatten()[:count].tolist()  # batch b is number b // world of its rank


def _columns(module: nn.Linear) -> Tensor:
    """Weight and bias of a layer side by side, (d_out, d_in + 1) float64."""
    weight = module.weight.detach().double()
    return weight if module.bias is None else torch.cat([weight, module.bias.detach().double()[:, None]], dim=1)


def _gradients(record: LinearRecord, num_batches: int) -> list[Tensor]:
    """Gradient by `_columns` of each of the batches that went through together."""
    found = []
    pairs = zip(record.activation.chunk(num_batches), record.gradient.chunk(num_batches), strict=True)
    for activation, gradient in pairs:
        a, g = activation.double().flatten(0, 1), gradient.double().flatten(0, 1)  # (N*T,d_in), (N*T,d_out)
        weight = g.T @ a
        found.append(weight if record.module.bias is None else torch.cat([weight, g.sum(0)[:, None]], dim=1))
    return found
