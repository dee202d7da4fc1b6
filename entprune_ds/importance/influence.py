"""Flux-Lite and ShortGPT: how far a block moves the clean stream, whatever the output makes of it.

flux_lite = mean squared difference of block input and output (Flux.1 lite, Freepik); shortgpt = 1 - cosine of the
two, per token (Block Influence of ShortGPT, arXiv 2403.03853, eq. 1). For a branch: of the stream after the block with
the branch and without it. Both are means over draws, so sums per jackknife group are all that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.jackknife import Resampled

NAMES = ("flux_lite", "shortgpt")
"""In the order of `sweep.Swept.changes`."""


class InfluenceStatistics:
    """Sums over draws of `sweep.Swept.changes`, by jackknife group; each rank adds its part, then all `reduce`."""

    def __init__(self, num_units: int, num_groups: int, device: torch.device):
        self.sums = torch.zeros(num_groups, num_units, len(NAMES), dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_groups, 1, 1, dtype=torch.float64, device=device)

    def update(self, group: int, changes: Tensor) -> None:
        """Add the changes (L,2,N) of N draws to a group. Not collective."""
        self.sums[group] += changes.sum(2)
        self.counts[group] += changes.shape[2]

    def reduce(self, stop: int) -> dict[str, Resampled]:
        """Scores of the first `stop` groups over all ranks' draws, added up in rank order. Collective: all ranks call.

        Every group has draws on some rank, and all are finite: `SweepStatistics.reduce` has checked it.
        """
        gathered = (comm.all_gather(s[:stop]) for s in (self.sums, self.counts))
        sums, counts = (sum(g, torch.zeros_like(g[0])) for g in gathered)
        values = sums.sum(0) / counts.sum(0)  # (L,2)
        rest = (sums.sum(0) - sums) / (counts.sum(0) - counts)  # (G,L,2)
        return {name: Resampled(values[:, i], rest[..., i]) for i, name in enumerate(NAMES)}
