"""All that a sweep leaves behind of one kind of unit: output, stream and entropy statistics of the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from entprune_ds.importance.entropy import Kept
from entprune_ds.importance.entropy_cells import EntropyGroups, EntropyStatistics
from entprune_ds.importance.estimators import EntropyChoice
from entprune_ds.importance.influence import InfluenceStatistics
from entprune_ds.importance.jackknife import Resampled
from entprune_ds.importance.measuring import Batch
from entprune_ds.importance.scores import pooled_entropy, resample_scores
from entprune_ds.importance.sweep import Swept
from entprune_ds.importance.sweep_statistics import GroupStatistics, LossFn, SweepStatistics


class UnitStatistics:
    """Streaming statistics of the variants that lack one unit, by jackknife group."""

    def __init__(
        self, kept_blocks: Sequence[int], most_groups: int, shape: tuple[int, ...], device: torch.device, unit: str,
        entropy: EntropyChoice,
    ):  # fmt: skip
        self.kept_blocks, self.entropy = kept_blocks, entropy
        self.outputs = SweepStatistics(kept_blocks, most_groups, shape, device, unit)
        self.influence = InfluenceStatistics(len(kept_blocks), most_groups, device)
        self.of_cells = EntropyStatistics(entropy.estimator, entropy.cells) if entropy.needs_draws else None
        self.groups: list[GroupStatistics] = []
        self.kept: list[list[Kept]] = []

    def update(self, group: int, swept: Swept, draws: Batch, loss_fn: LossFn) -> None:
        """Add this rank's part of a group, which may be empty. Not collective."""
        self.outputs.update(group, swept.outputs, draws.target, draws.t, loss_fn, swept.changes)
        self.influence.update(group, swept.changes)
        if self.of_cells is not None:
            self.of_cells.update(group, swept.outputs, draws.t, draws.labels)

    def resample(self, stop: int, entropy_needed: bool) -> dict[str, Resampled]:
        """Every score from the first `stop` groups, which are not added to afterwards. Collective: all ranks call.

        Raises:
            DistributedError: on all ranks, when an output is not finite.
            ValueError: see `resample_scores`.
        """
        self.groups += self.outputs.reduce(len(self.groups), stop)
        if self.of_cells is not None:
            self.kept += self.of_cells.reduce(len(self.kept))
            entropy = EntropyGroups(self.entropy.estimator, self.entropy.cells, self.kept, self.entropy.least)
        else:
            entropy = pooled_entropy(self.groups, self.entropy.estimator)
        found = resample_scores(self.groups, self.kept_blocks, entropy, entropy_needed)
        return found | self.influence.reduce(stop)
