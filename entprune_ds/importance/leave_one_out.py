"""The measure behind all leave-one-out criteria: one sweep over the calibration draws, split across ranks."""

from __future__ import annotations

import time

from entprune_ds import comm, fault_points
from entprune_ds.importance.influence import InfluenceStatistics
from entprune_ds.importance.measuring import Measuring, my_share
from entprune_ds.importance.scores import Scores, score_blocks
from entprune_ds.importance.stack_memory import stack_chunk, stack_problem, units_of
from entprune_ds.importance.sweep import Swept, sweep
from entprune_ds.importance.sweep_statistics import SweepStatistics
from entprune_ds.logs import get_logger

PROGRESS_SECONDS = 10.0
"""A sweep that takes longer says how far it is."""


def measure_sweep(m: Measuring, entropy_needed: bool = False) -> Scores:
    """One-sweep leave-one-out scores of every block. Collective: all ranks call.

    Those of the branch of `score.unit` are named criterion/branch, e.g. ced/attention.

    Args:
        m: the check.
        entropy_needed: whether blocks are ranked by an entropy, see `score_blocks`.

    Raises:
        DistributedError: on all ranks, when outputs are not finite or have no spread, or the variants do not fit
            `score.stack_memory`.
    """
    if (problem := stack_problem(m.config, comm.world_size(), len(m.kept_blocks))) is not None:
        raise comm.DistributedError(problem)
    size, groups = m.config.score.batch_size, m.config.score.draws // m.config.score.batch_size
    chunk, units = stack_chunk(m.config.model, m.parts.dtype), units_of(m.config)
    outputs: list[SweepStatistics] = []
    influence = [InfluenceStatistics(len(m.kept_blocks), groups, m.parts.device) for _ in units]
    start = shown = time.perf_counter()
    for group in range(groups):
        mine = my_share(m.draw("calibration", size))
        streams = None if m.streams is None else m.streams.of(group)
        swept = sweep(m.parts, m.kept_blocks, mine.z_t, mine.t, mine.labels, units, chunk, streams)
        for place, unit in enumerate(units):
            of_unit = _of_unit(swept, place, len(units))
            if len(outputs) == place:
                shape = tuple(swept.outputs.shape[2:])
                outputs.append(SweepStatistics(m.kept_blocks, groups, shape, swept.outputs.device, unit))
            outputs[place].update(group, of_unit.outputs, mine.target, mine.t, m.loss_fn, of_unit.changes)
            influence[place].update(group, of_unit.changes)
        fault_points.reach("scoring")
        if time.perf_counter() - shown >= PROGRESS_SECONDS:
            shown = time.perf_counter()
            left = (shown - start) / (group + 1) * (groups - group - 1)
            get_logger().info("scored calibration batch %d of %d, %.0f s left", group + 1, groups, left)
    scores: Scores = {}
    for place, unit in enumerate(units):
        groups_of_all_ranks = outputs[place].reduce()
        try:
            found = score_blocks(groups_of_all_ranks, m.kept_blocks, entropy_needed=entropy_needed and unit == "block")
        except ValueError as error:  # the same on all ranks: the statistics are
            raise comm.DistributedError(f"check {m.check}: {error}") from error
        found |= influence[place].scores(m.kept_blocks)
        scores |= found if unit == "block" else {f"{name}/{unit}": by_block for name, by_block in found.items()}
    return scores


def _of_unit(swept: Swept, place: int, num_units: int) -> Swept:
    """The full model and the variants that lack one unit of several."""
    if num_units == 1:
        return swept
    rows = [0, *range(1 + place, len(swept.outputs), num_units)]
    return Swept(swept.outputs[rows], swept.changes[place::num_units])
