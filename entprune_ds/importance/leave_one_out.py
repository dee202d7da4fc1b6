"""The measure behind all leave-one-out criteria: one sweep over the calibration draws, split across ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator

from entprune_ds import comm, fault_points
from entprune_ds.config import ScoreConfig
from entprune_ds.importance.class_draws import draws_of_classes
from entprune_ds.importance.estimators import EntropyChoice, chosen_entropy
from entprune_ds.importance.jackknife import Resampled, looks, separated
from entprune_ds.importance.measuring import Batch, Measuring, my_share
from entprune_ds.importance.scores import Scores, as_scores
from entprune_ds.importance.stack_memory import stack_chunk, stack_problem, units_of
from entprune_ds.importance.sweep import sweep
from entprune_ds.importance.unit_statistics import UnitStatistics
from entprune_ds.logs import get_logger

PROGRESS_SECONDS = 10.0
"""A sweep that takes longer says how far it is."""


def measure_sweep(m: Measuring, entropy_needed: bool = False) -> Scores:
    """One-sweep leave-one-out scores of every block. Collective: all ranks call.

    Those of the branch of `score.unit` are named criterion/branch, e.g. ced/attention.

    Args:
        m: the check.
        entropy_needed: whether blocks are ranked by an entropy, see `resample_scores`.

    Raises:
        DistributedError: on all ranks, when outputs are not finite or have no spread, a cell has too few draws, or the
            variants do not fit `score.stack_memory`.
    """
    if (problem := stack_problem(m.config, comm.world_size(), len(m.kept_blocks))) is not None:
        raise comm.DistributedError(problem)
    score, stops = m.config.score, _stops(m.config.score)
    collecting = _Collecting(m, stops[-1])
    for stop in stops:
        collecting.draw_until(stop)
        try:
            found = {unit: s.resample(stop, entropy_needed and unit == "block") for unit, s in collecting.units.items()}
        except ValueError as error:  # the same on all ranks: the statistics are
            raise comm.DistributedError(f"check {m.check}: {error}") from error
        if stop == stops[-1] or _resolved(m, found["block"], len(stops)):
            break
    scores: Scores = {}
    for unit, resampled in found.items():
        named = resampled if unit == "block" else {f"{name}/{unit}": score for name, score in resampled.items()}
        scores |= as_scores(named, m.kept_blocks, score.confidence, stop * score.batch_size)
    return scores


def _stops(score: ScoreConfig) -> list[int]:
    """Numbers of batches after which the scores are looked at."""
    fewest = score.draws // score.batch_size
    return [fewest] if score.until == "draws" else looks(fewest, score.max_draws // score.batch_size)


def _resolved(m: Measuring, found: dict[str, Resampled], num_looks: int) -> bool:
    """Whether the blocks that this check may remove are told apart from those that stay. Collective: rank 0 decides.

    Protected blocks are neither.

    Every look is another chance to stop by luck, so each takes its share of the error allowed. A greedy ranking scores
    again after each block, so it is about one.
    """
    score, first = m.config.score, 1 if m.config.score.mode == "greedy" else m.removable
    confidence = 1 - (1 - score.confidence) / num_looks
    done, name, protected = None, m.config.prune.criterion, m.config.protected_blocks
    if comm.is_main():
        free = [place for place, block in enumerate(m.kept_blocks) if block not in protected]
        of_free = Resampled(found[name].values[free], found[name].replicates[:, free])
        done = separated(of_free, [m.kept_blocks[place] for place in free], first, confidence)
    return comm.broadcast_json(done)


class _Collecting:
    """The batches of a check, from the first to the last that any stopping rule may ask for."""

    def __init__(self, m: Measuring, most: int):
        self.m, self.most, self.drawn = m, most, 0
        self.chunk, self.batches = stack_chunk(m.config.model, m.parts.dtype), _batches(m)
        self.entropy: EntropyChoice = chosen_entropy(m, self.chunk)
        self.units: dict[str, UnitStatistics] = {}
        self.start = self.shown = time.perf_counter()

    def draw_until(self, stop: int) -> None:
        """Sweep until this many batches are scored. Collective: all ranks call."""
        m, units = self.m, units_of(self.m.config)
        while self.drawn < stop:
            mine = my_share(next(self.batches))
            streams = None if m.streams is None else m.streams.of(self.drawn)
            swept = sweep(m.parts, m.kept_blocks, mine.z_t, mine.t, mine.labels, units, self.chunk, streams)
            for place, unit in enumerate(units):
                if unit not in self.units:
                    shape, device = tuple(swept.outputs.shape[2:]), swept.outputs.device
                    self.units[unit] = UnitStatistics(m.kept_blocks, self.most, shape, device, unit, self.entropy)
                self.units[unit].update(self.drawn, swept.of_unit(place, len(units)), mine, m.loss_fn)
            self.drawn += 1
            fault_points.reach("scoring")
            self._tell()

    def _tell(self) -> None:
        if time.perf_counter() - self.shown >= PROGRESS_SECONDS:
            self.shown = time.perf_counter()
            left = (self.shown - self.start) / self.drawn * (self.most - self.drawn)
            message = "scored calibration batch %d of at most %d, %.0f s left"
            get_logger().info(message, self.drawn, self.most, left)


def _batches(m: Measuring) -> Iterator[Batch]:
    size = m.config.score.batch_size
    if m.config.score.within_class:
        yield from draws_of_classes(m, "calibration", size)
    while True:
        yield m.draw("calibration", size)
