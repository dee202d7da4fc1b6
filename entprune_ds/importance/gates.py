"""Groups of blocks that choose their mask together, and the categorical gates over the masks of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """N of M consecutive blocks stay."""

    blocks: tuple[int, ...]
    """M original indices."""
    masks: Tensor
    """All C(M,N) choices, (C,M) float64 of 0 and 1; the first keeps the lowest indices."""


def split_into_groups(kept_blocks: Sequence[int], target: int, group_size: int) -> list[Group]:
    """Groups of consecutive blocks that together keep `target` of them.

    There are G = ceil(depth / group_size) groups, or fewer where fewer blocks stay or go. The number that stays and the
    number that goes are each spread evenly over the groups, to within one, so that every group keeps and drops at least
    one block, whatever the depths: 28 -> 14 is seven groups 2:4, 12 -> 4 is 1:4, 1:4, 2:4, 12 -> 11 one group 11:12.
    """
    stay, go = target, len(kept_blocks) - target
    if go <= 0:
        return [Group(tuple(kept_blocks), torch.ones(1, len(kept_blocks), dtype=torch.float64))]
    count = min(-(-len(kept_blocks) // group_size), stay, go)
    groups, start, stays_before = [], 0, 0
    for g in range(1, count + 1):
        stays, end = g * stay // count, g * stay // count - (-g * go // count)  # one rounded down, the other up
        blocks = tuple(kept_blocks[start:end])
        chosen = [set(c) for c in combinations(range(len(blocks)), stays - stays_before)]
        masks = [[float(i in places) for i in range(len(blocks))] for places in chosen]
        groups.append(Group(blocks, torch.tensor(masks, dtype=torch.float64)))
        start, stays_before = end, stays
    return groups


class Gates:
    """A categorical distribution per group over its masks, learned through straight-through Gumbel-softmax samples."""

    def __init__(self, groups: Sequence[Group], scale: float):
        """
        Args:
            groups: of all blocks, in their order.
            scale: factor of the logits (TinyFusion: 100).
        """
        self.groups, self.scale = list(groups), scale
        self.logits = [torch.zeros(len(g.masks), dtype=torch.float64, requires_grad=True) for g in self.groups]

    def sample(self, tau: float, generator: torch.Generator) -> Tensor:
        """A gate per block (L,) of exactly 0 or 1, whose gradient is that of the soft choice (arXiv 1611.01144)."""
        gates = []
        for group, logits in zip(self.groups, self.logits, strict=True):
            uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64).clamp_min(1e-300)
            soft = torch.softmax((self.scale * logits - (-uniform.log()).log()) / tau, dim=0)
            hard = torch.zeros_like(soft)
            hard[soft.argmax()] = 1
            gates.append((hard + (soft - soft.detach())) @ group.masks)
        return torch.cat(gates)

    def probabilities(self) -> dict[int, float]:
        """Probability of each block to be kept."""
        found: dict[int, float] = {}
        for group, logits in zip(self.groups, self.logits, strict=True):
            kept = torch.softmax(self.scale * logits.detach(), dim=0) @ group.masks
            found |= dict(zip(group.blocks, kept.tolist(), strict=True))
        return found

    def best(self) -> dict[int, bool]:
        """Whether each block is in the most probable mask of its group."""
        found: dict[int, bool] = {}
        for group, logits in zip(self.groups, self.logits, strict=True):
            mask = group.masks[logits.argmax()]
            found |= dict(zip(group.blocks, mask.bool().tolist(), strict=True))
        return found
