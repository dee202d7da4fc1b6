"""The measure behind all leave-one-out criteria: one sweep over the calibration draws, split across ranks."""

from __future__ import annotations

import time

import torch

from entprune_ds import comm, fault_points
from entprune_ds.config import ModelConfig
from entprune_ds.importance.measuring import Measuring, my_share
from entprune_ds.importance.scores import Scores, score_blocks
from entprune_ds.importance.sweep import leave_one_out
from entprune_ds.importance.sweep_statistics import SweepStatistics
from entprune_ds.logs import get_logger

PROGRESS_SECONDS = 10.0
"""A sweep that takes longer says how far it is."""
WIDEST_ACTIVATION = {"cpu": 2**23, "cuda": 2**30}
"""Bytes of the widest activation (MLP) in one block evaluation of the sweep: bounds its memory, fits CPU caches."""


def measure_sweep(m: Measuring, entropy_needed: bool = False) -> Scores:
    """One-sweep leave-one-out scores of every block. Collective: all ranks call.

    Args:
        m: the check.
        entropy_needed: whether blocks are ranked by an entropy, see `score_blocks`.

    Raises:
        DistributedError: on all ranks, when outputs are not finite or have no spread.
    """
    size, groups = m.config.score.batch_size, m.config.score.draws // m.config.score.batch_size
    chunk = stack_chunk(m.config.model, m.parts.dtype)
    statistics: SweepStatistics | None = None
    start = shown = time.perf_counter()
    for group in range(groups):
        mine = my_share(m.draw("calibration", size))
        outputs = leave_one_out(m.parts, m.kept_blocks, mine.z_t, mine.t, mine.labels, chunk=chunk)
        if statistics is None:
            statistics = SweepStatistics(m.kept_blocks, groups, tuple(outputs.shape[2:]), outputs.device)
        statistics.update(group, outputs, mine.target, mine.t, m.loss_fn)
        fault_points.reach("scoring")
        if time.perf_counter() - shown >= PROGRESS_SECONDS:
            shown = time.perf_counter()
            left = (shown - start) / (group + 1) * (groups - group - 1)
            get_logger().info("scored calibration batch %d of %d, %.0f s left", group + 1, groups, left)
    assert statistics is not None  # groups >= 2 is checked with the config
    groups_of_all_ranks = statistics.reduce()
    try:
        return score_blocks(groups_of_all_ranks, m.kept_blocks, entropy_needed=entropy_needed)
    except ValueError as problem:  # the same on all ranks: the statistics are
        raise comm.DistributedError(f"check {m.check}: {problem}") from problem


def stack_chunk(model: ModelConfig, dtype: torch.dtype) -> int:
    """Examples (variants x draws) that one block evaluation takes at once within WIDEST_ACTIVATION."""
    tokens = (model.input_size // model.patch_size) ** 2
    widest = tokens * model.mlp_size * dtype.itemsize
    return max(1, WIDEST_ACTIVATION[comm.device().type] // widest)
