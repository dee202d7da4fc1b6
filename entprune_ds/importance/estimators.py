"""The entropy estimator that `score.*` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from entprune_ds.importance.basis import fit_basis
from entprune_ds.importance.entropy import FORMS, Estimator, MomentEstimator
from entprune_ds.importance.entropy_cells import Cells
from entprune_ds.importance.entropy_draws import DrawEstimator, knn, low_rank
from entprune_ds.importance.measuring import Measuring

TIME_SPAN = {"dit": 1000.0, "sit": 1.0}
"""Where t ends: DiT counts 1000 timesteps."""


@dataclass(frozen=True)
class EntropyChoice:
    """An estimator and the cells that it is averaged over."""

    estimator: Estimator
    cells: Cells
    least: int
    """Draws that every cell must hold."""

    @property
    def needs_draws(self) -> bool:
        """Whether it collects something of its own: the moments over all draws, a sweep has anyway."""
        return self.cells.count > 1 or not isinstance(self.estimator, MomentEstimator)


def chosen_entropy(m: Measuring, chunk: int) -> EntropyChoice:
    """The estimator, with its basis where it works in one. Collective: all ranks call.

    Args:
        m: the check.
        chunk: most samples per block call.
    """
    score = m.config.score
    cells = Cells(score.timestep_buckets, score.within_class, TIME_SPAN[m.config.model.process])
    least = score.draws_per_cell if score.timestep_buckets == 1 else score.draws_per_cell // 2  # t is random
    return EntropyChoice(_estimator(m, chunk), cells, least)


def _estimator(m: Measuring, chunk: int) -> Estimator:
    score = m.config.score
    if score.estimator == "low_rank":
        return DrawEstimator(partial(low_rank, shrinkage=score.shrinkage), fit_basis(m, score.rank, chunk))
    if score.estimator == "knn":
        return DrawEstimator(partial(knn, k=score.knn_k), fit_basis(m, score.knn_dim, chunk))
    return MomentEstimator(FORMS[score.estimator])
