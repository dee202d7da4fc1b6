"""Entropies pooled over all draws, or averaged over cells: parts of the time axis, classes, or both.

The entropy within cells, H(X | cell), leaves out what the mere difference between timesteps or between classes adds to
the spread. Every cell has the same weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds.importance.entropy import Estimator, Kept
from entprune_ds.importance.jackknife import leave_one_out


@dataclass(frozen=True)
class Cells:
    """How draws are told apart."""

    buckets: int = 1
    """Equal parts of the time axis."""
    classes: tuple[int, ...] = ()
    """One row of cells per class; other classes count in no cell. Empty: classes are pooled."""
    span: float = 1.0
    """Where the time axis ends (not included where t is a number of a step)."""

    @property
    def count(self) -> int:
        """Number of cells."""
        return self.buckets * max(1, len(self.classes))

    def of(self, t: Tensor, labels: Tensor) -> Tensor:
        """Cell of every draw, (N,), (N,) i64 -> (N,) i64; -1 for none."""
        cell = (t.double() / self.span * self.buckets).long().clamp(0, self.buckets - 1)
        if not self.classes:
            return cell
        place = labels.unsqueeze(1) == torch.tensor(self.classes, device=labels.device)  # (N,classes)
        row = place.int().argmax(1).to(cell.device)
        return torch.where(place.any(1).to(cell.device), row * self.buckets + cell, -1)

    def describe(self, cell: int) -> str:
        """A cell in words."""
        row, bucket = divmod(cell, self.buckets)
        words = [f"class {self.classes[row]}"] if self.classes else []
        if self.buckets > 1:
            words.append(f"t in [{bucket * self.span / self.buckets:g}, {(bucket + 1) * self.span / self.buckets:g}]")
        return ", ".join(words) or "all draws"


@dataclass(frozen=True)
class EntropyGroups:
    """What an estimator kept of every jackknife group and cell, over all ranks: an entropy with its replicates."""

    estimator: Estimator
    cells: Cells
    kept: Sequence[Sequence[Kept]]
    """[group][cell]."""
    least: int = 1
    """Draws that every cell must hold."""

    def differences(self) -> tuple[Tensor, Tensor]:
        """Entropy terms of every variant minus those of the full model, over all draws.

        Returns:
            differences (L,K) float64, whose sum over K is the difference of the entropies, 0 where a term has no
            spread in either; number of such terms per variant (L,) i64.

        Raises:
            ValueError: when a cell has fewer draws than it must, naming it.
        """
        total = functools.reduce(self.merge, self.kept)
        self._check(total)
        return self._terms(total)

    def replicates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The differences and the numbers of terms without spread, without each of the groups in turn."""
        for rest in leave_one_out(self.kept, self.merge):
            yield self._terms(rest)

    def merge(self, a: Sequence[Kept], b: Sequence[Kept]) -> list[Kept]:
        """Two groups together, cell by cell."""
        return [self.estimator.merge(x, y) for x, y in zip(a, b, strict=True)]

    def _terms(self, kept: Sequence[Kept]) -> tuple[Tensor, Tensor]:
        terms = torch.cat([self.estimator.differences(cell) for cell in kept], dim=1)
        finite = torch.isfinite(terms)
        return torch.where(finite, terms, 0.0) / self.cells.count, (~finite).sum(1)

    def _check(self, total: Sequence[Kept]) -> None:
        counts = [self.estimator.count(kept) for kept in total]
        few = [f"{self.cells.describe(i)}: {count}" for i, count in enumerate(counts) if count < self.least]
        if few:
            raise ValueError(
                f"an entropy needs at least {self.least} draws in every cell ({'; '.join(few)}). Raise `score.draws`, "
                "or lower `score.timestep_buckets` or the number of classes in `score.within_class`. Nothing was "
                "removed."
            )


class EntropyStatistics:
    """Streaming: what an estimator keeps of this rank's draws, by jackknife group and cell."""

    def __init__(self, estimator: Estimator, cells: Cells):
        self.estimator, self.cells = estimator, cells
        self.groups: list[list[Kept]] = []

    def update(self, group: int, outputs: Tensor, t: Tensor, labels: Tensor) -> None:
        """Add draws to a group: the last one, or a new one behind it. Not collective; every rank opens every group.

        Args:
            outputs: (1+L,N,C,H,W), N may be 0; t, labels: (N,).
        """
        cell = self.cells.of(t, labels).to(outputs.device)
        new = [self.estimator.keep(outputs[:, cell == i]) for i in range(self.cells.count)]
        if group == len(self.groups):
            self.groups.append(new)
        else:
            self.groups[group] = [self.estimator.merge(a, b) for a, b in zip(self.groups[group], new, strict=True)]

    def reduce(self, first: int = 0) -> list[list[Kept]]:
        """Groups from `first` on, over all ranks. Collective: all ranks call."""
        return [[self.estimator.gather(kept) for kept in group] for group in self.groups[first:]]
