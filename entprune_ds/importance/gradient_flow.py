"""Gradient flow: what makes the gradient of the loss grow when it goes. The highest score goes first.

S_i = - d ||grad L||^2 / d m_i for a gate m_i on the output of unit i: the predicted rise of the squared gradient norm
when the unit goes, so that what stays trains fast (gradient-flow pruning, arXiv 2501.09464; the sign of GraSP, arXiv
2002.07376). The gradient is that by the weights and biases of the linear layers of all present blocks; L is the mean
loss over the draws of all ranks.

With v = grad L held fixed, S_i = -2 d<v, grad L>/dm_i = -2 (the change of dL/dm_i when the weights move along v): one
pass forward and backward that carries this change along (forward-over-reverse) gives every gate of every kind at once,
and exactly. A block at a time, never a second backward pass through the whole model.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from entprune_ds import comm
from entprune_ds.importance.measuring import Batch, Measuring, my_share
from entprune_ds.importance.parts import Parts, embed
from entprune_ds.importance.scores import Score, Scores
from entprune_ds.importance.sweep_statistics import LossFn

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class GradientFlow:
    """Scores of all gates, by block and by name of the gate, see `Block.gates`."""

    norm_squared: float
    """||grad L||^2 over the weights of the blocks."""
    rise: dict[int, Tensors]
    """S, the predicted rise of it when the unit goes; float64, shaped as the gate."""
    error: dict[int, Tensors]
    """Standard error over the groups of draws, for v as it is: what v itself owes to its draws is not in it."""


class _Stream(NamedTuple):
    """One group of draws of this rank on its way through the blocks."""

    group: int
    x: Tensor
    """(N,T,D)."""
    c: Tensor
    """(N,D)."""
    target: Tensor
    t: Tensor


def measure_gradient_flow(m: Measuring) -> Scores:
    """Scores of whole blocks under the name gradient_flow. Collective: all ranks call.

    Raises:
        DistributedError: on all ranks, see `gradient_flow`.
    """
    try:
        found = gradient_flow(m.parts, m.kept_blocks, gradient_draws(m), m.config.score.gradient_draws, m.loss_fn)
    except ValueError as problem:  # the same on all ranks
        raise comm.DistributedError(f"check {m.check}: {problem} Nothing was removed.") from problem
    return {
        "gradient_flow": {b: Score(found.rise[b]["gate"].item(), found.error[b]["gate"].item()) for b in m.kept_blocks}
    }


def gradient_draws(m: Measuring) -> list[Batch]:
    """This rank's share of every group of draws."""
    size = m.config.score.gradient_batch_size
    return [my_share(m.draw("gradient_flow", size)) for _ in range(m.config.score.gradient_draws // size)]


def gradient_flow(
    parts: Parts, kept_blocks: Sequence[int], groups: Sequence[Batch], num_draws: int, loss_fn: LossFn
) -> GradientFlow:
    """S of every gate of every block. Collective: all ranks call; 4 L calls of parts.block.

    All parameters stay frozen, and nothing is hooked. A rank keeps the inputs of all blocks, and 1 / world size of v.
    CPU attention has no second derivative, so attention takes its MATH form.

    Args:
        parts: the model; its blocks have `gates()`, see models.layers.Block, and compute with buffers of these names.
        kept_blocks: original indices of the present blocks, sorted.
        groups: this rank's share of each of two or more equal groups of draws; a share may be empty.
        num_draws: draws of all groups and ranks.
        loss_fn: see LossFn; called in float64.

    Raises:
        ValueError: on all ranks, when a number is not finite, naming block and group, or when there is no gradient.
    """
    with _plain_linear(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)  # forward AD of torch compiles some
        inputs = _inputs(parts, kept_blocks, groups)
        losses = [_head_loss(parts, stream, num_draws, loss_fn) for stream in inputs[-1]]
        norm_squared, shards = _weight_gradients(parts, kept_blocks, inputs, losses)
        if norm_squared == 0 or not math.isfinite(norm_squared):
            what = "zero" if norm_squared == 0 else str(norm_squared)
            raise ValueError(
                f"the squared norm of the gradient by the blocks is {what}, so nothing can be said about its change "
                "(an untrained model has no gradient there): train first, or choose another criterion."
            )
        tangents = _tangents(parts, kept_blocks, inputs, shards)
        changes = _gate_changes(parts, kept_blocks, inputs, tangents, shards, losses, len(groups))
    rise = {b: {name: -2 * c.sum(0) for name, c in of_block.items()} for b, of_block in changes.items()}
    error = {
        b: {name: 2 * len(groups) ** 0.5 * c.std(0) for name, c in of_block.items()} for b, of_block in changes.items()
    }
    return GradientFlow(norm_squared, rise, error)


@contextlib.contextmanager
def _plain_linear() -> Iterator[None]:
    """At ZeRO-3 DeepSpeed has put a linear layer without forward derivative in place of torch's, process-wide."""
    given = F.linear
    F.linear = torch.ops.aten.linear.default
    try:
        yield
    finally:
        F.linear = given


def _inputs(parts: Parts, kept_blocks: Sequence[int], groups: Sequence[Batch]) -> list[list[_Stream]]:
    """The streams before every block and, last, before the head."""
    streams, problem = [], None
    for number, batch in enumerate(groups):
        if len(batch.z_t):
            x, c = embed(parts, batch.z_t, batch.t, batch.labels)  # (N,T,D), (N,D)
            streams.append(_Stream(number, x, c, batch.target.to(x.device), batch.t.to(x.device)))
    inputs = [streams]
    for index in kept_blocks:
        block = parts.block(index)
        streams = [s._replace(x=block(s.x, s.c)) for s in streams]
        bad = [s.group for s in streams if not bool(torch.isfinite(s.x).all())]
        if bad and problem is None:
            problem = f"block {index} gives NaN or infinite activations on batch {bad[0]} of the gradient draws."
        inputs.append(streams)
    problems = sorted({p for p in comm.all_gather_json(problem) if p is not None})
    if problems:
        raise ValueError(" ".join(problems))
    return inputs


def _head_loss(parts: Parts, stream: _Stream, num_draws: int, loss_fn: LossFn) -> Callable[[Tensor], Tensor]:
    """(x (N,T,D)) -> gradient of this rank's part of L with respect to it."""

    def loss(x: Tensor) -> Tensor:
        prediction = parts.head(x, stream.c).double()
        target = stream.target.double() if stream.target.is_floating_point() else stream.target
        return loss_fn(prediction, target, stream.t).sum() / num_draws

    return grad(loss)


def _weights(block: nn.Module) -> Tensors:
    return {name: p.detach() for name, p in block.named_parameters()}


def _output(block: nn.Module, gates: Tensors, c: Tensor, x: Tensor, weights: Tensors) -> Tensor:
    """(N,T,D) -> (N,T,D) with these weights and gates."""
    return functional_call(block, {**weights, **gates}, (x, c))


def _pulled(
    block: nn.Module, gates: Tensors, c: Tensor, x: Tensor, weights: Tensors, gradient: Tensor
) -> tuple[Tensor, Tensors]:
    """Gradient by x and by the gates, from that by the output."""
    _, pull, *_ = vjp(lambda x, gates: _output(block, gates, c, x, weights), x, gates)
    return pull(gradient)


def _weight_gradients(
    parts: Parts,
    kept_blocks: Sequence[int],
    inputs: list[list[_Stream]],
    losses: list[Callable[[Tensor], Tensor]],
) -> tuple[float, dict[int, Tensor]]:
    """||v||^2 and this rank's share of v = grad L, by block."""
    norm_squared, shards = 0.0, {}
    gradients = [of_loss(stream.x) for of_loss, stream in zip(losses, inputs[-1], strict=True)]
    for position in reversed(range(len(kept_blocks))):
        block = parts.block(kept_blocks[position])
        weights, gates = _weights(block), block.gates()  # type: ignore[operator]
        total = torch.zeros(sum(w.numel() for w in weights.values()), dtype=parts.dtype, device=parts.device)
        for i, stream in enumerate(inputs[position]):
            _, pull, *_ = vjp(partial(_output, block, gates, stream.c), stream.x, weights)
            gradients[i], by_weight = pull(gradients[i])
            total += torch.cat([g.flatten() for g in by_weight.values()])
        comm.all_reduce_sum(total)
        norm_squared += total.double().square().sum().item()
        shards[kept_blocks[position]] = _share(total)
    return norm_squared, shards


def _share(whole: Tensor) -> Tensor:
    """This rank's equal part of a flat tensor, padded with zeros."""
    size = -(-len(whole) // comm.world_size())
    part = whole[comm.rank() * size : (comm.rank() + 1) * size]
    return F.pad(part, (0, size - len(part))).clone()


def _whole(share: Tensor, like: Tensors) -> Tensors:
    """The parts of all ranks, cut as the tensors of `like`."""
    flat, found, start = torch.cat(comm.all_gather(share)), {}, 0
    for name, tensor in like.items():
        found[name] = flat[start : start + tensor.numel()].view_as(tensor)
        start += tensor.numel()
    return found


def _tangents(
    parts: Parts, kept_blocks: Sequence[int], inputs: list[list[_Stream]], shards: dict[int, Tensor]
) -> list[list[Tensor]]:
    """Change of every stream, as in `inputs`, when the weights move along v."""
    changes = [[torch.zeros_like(stream.x) for stream in inputs[0]]]
    for position, index in enumerate(kept_blocks):
        block = parts.block(index)
        weights, gates = _weights(block), block.gates()  # type: ignore[operator]
        v, after = _whole(shards[index], weights), []
        for stream, change in zip(inputs[position], changes[-1], strict=True):
            _, moved, *_ = jvp(partial(_output, block, gates, stream.c), (stream.x, weights), (change, v))
            after.append(moved)
        changes.append(after)
    return changes


def _gate_changes(
    parts: Parts,
    kept_blocks: Sequence[int],
    inputs: list[list[_Stream]],
    tangents: list[list[Tensor]],
    shards: dict[int, Tensor],
    losses: list[Callable[[Tensor], Tensor]],
    num_groups: int,
) -> dict[int, Tensors]:
    """Change of dL/dgate along v, (groups, *gate) float64 over all ranks, by block and gate."""
    pairs = [
        jvp(of_loss, (stream.x,), (change,))
        for of_loss, stream, change in zip(losses, inputs[-1], tangents[-1], strict=True)
    ]
    found = {}
    for position in reversed(range(len(kept_blocks))):
        index = kept_blocks[position]
        block = parts.block(index)
        weights, gates = _weights(block), block.gates()  # type: ignore[operator]
        v = _whole(shards[index], weights)
        sums = {name: torch.zeros(num_groups, *gate.shape, dtype=torch.float64) for name, gate in gates.items()}
        for i, (stream, change) in enumerate(zip(inputs[position], tangents[position], strict=True)):
            here, towards = (stream.x, weights, pairs[i][0]), (change, v, pairs[i][1])
            (gradient, _), (moved, by_gate), *_ = jvp(partial(_pulled, block, gates, stream.c), here, towards)
            pairs[i] = gradient, moved
            for name, value in by_gate.items():
                sums[name][stream.group] += value.double().cpu()
        found[index] = {name: comm.all_reduce_sum(s.to(parts.device)).cpu() for name, s in sums.items()}
    return {index: found[index] for index in kept_blocks}
