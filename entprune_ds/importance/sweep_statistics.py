"""What a sweep leaves behind: per jackknife group, sums and moments that merge over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance import moments
from entprune_ds.importance.moments import Moments

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss_fn(prediction (N,C,H,W), target, t (N,)) -> loss per example (N,); target is the objective's, batch first."""


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of some draws, float64, for the 1 + L variants of a sweep (0 is the full model)."""

    outputs: Moments
    """Moments of the outputs over the draws, (1+L,C,H,W)."""
    squared_deviation: Tensor
    """Sum over draws and elements of the squared difference from the full model's output, (1+L,)."""
    loss: Tensor
    """Sum over draws of the loss per example, (1+L,)."""


def merge(a: GroupStatistics, b: GroupStatistics) -> GroupStatistics:
    """Statistics of the draws of a and b together."""
    outputs = moments.merge(a.outputs, b.outputs)
    return GroupStatistics(outputs, a.squared_deviation + b.squared_deviation, a.loss + b.loss)


class SweepStatistics:
    """Streaming statistics of leave-one-out outputs, by jackknife group.

    A group is one calibration batch, the same draws whatever the number of ranks; each rank adds the part
    that it computed, in one or more updates, then all ranks call `reduce`.
    """

    def __init__(
        self, kept_blocks: Sequence[int], num_groups: int, output_shape: tuple[int, ...], device: torch.device,
        unit: str = "block",
    ):  # fmt: skip
        """
        Args:
            kept_blocks: present blocks in the order of the sweep.
            num_groups: jackknife groups, at least 2.
            output_shape: (C,H,W) of one prediction.
            device: where the statistics live; that of the outputs.
            unit: what the variants lack, of sweep.UNITS; named in errors.
        """
        if num_groups < 2:
            raise ValueError(f"standard errors need at least 2 groups of draws, got {num_groups}.")
        self.kept_blocks = tuple(kept_blocks)
        self._what = "block" if unit == "block" else f"the {unit} of block"
        variants = 1 + len(self.kept_blocks)
        zeros = torch.zeros(variants, dtype=torch.float64, device=device)
        empty = GroupStatistics(moments.zero_moments((variants, *output_shape), device), zeros, zeros)
        self.groups: list[GroupStatistics] = [empty] * num_groups
        self.problem: str | None = None
        """First output that was not finite; raised by `reduce`, on all ranks together."""

    def update(
        self, group: int, outputs: Tensor, target: Tensor, t: Tensor, loss_fn: LossFn, changes: Tensor | None = None
    ) -> None:
        """Add draws to a group. Not collective.

        Outputs that are not finite are remembered as `problem` instead of raised, because the other ranks
        would wait for this one in the next collective.

        Args:
            group: index of the group (calibration batch).
            outputs: (1+L,N,C,H,W) of `sweep.leave_one_out`; N = 0 adds nothing.
            target, t: (N,...) and (N,) of the objective.
            loss_fn: called in float64, one variant at a time.
            changes: (L,2,N) of `sweep.Swept`; names the first block whose stream is not finite.
        """
        if self.problem is not None or outputs.shape[1] == 0:
            return
        target, full = target.to(outputs.device, torch.float64), outputs[0].double()
        of_variants, deviations, losses = [], [], []
        for output in outputs:
            prediction = output.double()
            of_variants.append(moments.moments_of(prediction))
            deviations.append((prediction - full).square().sum())
            losses.append(loss_fn(prediction, target, t).double().sum())
        mean, m2 = torch.stack([m.mean for m in of_variants]), torch.stack([m.m2 for m in of_variants])
        new = GroupStatistics(Moments(outputs.shape[1], mean, m2), torch.stack(deviations), torch.stack(losses))
        finite = torch.isfinite(m2).flatten(1).all(1) & torch.isfinite(new.loss)
        self.problem = self._describe(finite.tolist(), group, changes)
        if self.problem is None:
            self.groups[group] = merge(self.groups[group], new)

    def _describe(self, finite: list[bool], group: int, changes: Tensor | None) -> str | None:
        """One sentence that names the block and the batch, from which variants and streams are finite."""
        if all(finite):
            return None
        where = f"in calibration batch {group}. Nothing was removed."
        named = ", ".join(str(b) for b, ok in zip(self.kept_blocks, finite[1:], strict=True) if ok == (not finite[0]))
        if finite[0]:
            return f"the output or the loss is NaN or infinite when {self._what} {named} is dropped, {where}"
        if named:
            because = f"because of {self._what} {named} (finite without it)"
            return f"the output or the loss is NaN or infinite {because}, {where}"
        streams = [] if changes is None else torch.isfinite(changes).flatten(1).all(1).tolist()
        found = "" if all(streams) else f", and the activations at block {self.kept_blocks[streams.index(False)]} are"
        which = f"whichever of blocks {list(self.kept_blocks)} is dropped{found}"
        return f"the output or the loss is NaN or infinite {which}, {where}"

    def reduce(self, first: int = 0, stop: int | None = None) -> list[GroupStatistics]:
        """Statistics of all ranks' draws, bit-identical on all ranks. Collective: all ranks call.

        Gathered and merged in rank order, one group at a time.

        Args:
            first, stop: the groups to reduce; all of them by default.

        Raises:
            comm.DistributedError: on all ranks, when an output of any rank was not finite, naming block and batch.
            ValueError: when a group has no draws on any rank.
        """
        comm.raise_together(self.problem)
        reduced = [_gather_group(group) for group in self.groups[first:stop]]
        empty = [i for i, group in enumerate(reduced, first) if group.outputs.count == 0]
        if empty:
            raise ValueError(f"calibration batches {empty} have no draws on any rank; every batch needs some.")
        return reduced


def _gather_group(group: GroupStatistics) -> GroupStatistics:
    """Merge one group over the ranks, in rank order. Collective: all ranks call."""
    outputs = group.outputs
    fields = [outputs.mean.new_tensor([outputs.count]), outputs.mean, outputs.m2, group.squared_deviation, group.loss]
    sizes, shape = [f.numel() for f in fields], outputs.mean.shape
    parts = []
    for packed in comm.all_gather(torch.cat([f.reshape(-1) for f in fields])):
        count, mean, m2, deviation, loss = packed.split(sizes)
        parts.append(GroupStatistics(Moments(int(count.item()), mean.view(shape), m2.view(shape)), deviation, loss))
    return merge_all(parts)


def merge_all(parts: Sequence[GroupStatistics]) -> GroupStatistics:
    """Merge one or more statistics from first to last."""
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    return total
