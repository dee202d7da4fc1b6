"""Rank functions of tests/test_estimate.py."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from entprune_ds import comm, estimate, estimate_resize
from entprune_ds.config import ParallelConfig
from entprune_ds.engine.build import build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.resize import resize
from tests.tiny import tiny_config
from tools.measure_memory import blank
from tools.memory_ranks import rank_peak


def peak_and_layouts(case: dict[str, Any], topologies: list[list[int]], folder: str) -> dict[str, Any]:
    """The peak of a case; then, for (zero_stage, pipe_stages), who holds what and what a resize reports.

    Each beside what the estimate says. The pipeline is cut evenly, as the estimate does.
    """
    # the peaks of three steps lie up to 7 % apart, by what happens to be alive at once; those of eight hardly
    found: dict[str, Any] = {"peak": rank_peak(case, folder, steps=8), "layouts": [], "resizes": []}
    for zero_stage, pipe_stages in topologies:
        config = tiny_config(zero_stage)
        parallel = ParallelConfig(ds_config=f"zero{zero_stage}_fp32", pipe_stages=pipe_stages)
        config = replace(config, parallel=parallel)
        plan = estimate.plan_of(config, comm.world_size())
        engine = build_engine(config, config.model, plan.cut if pipe_stages > 1 else None)
        initialize_fresh(engine, seed=0)
        found["layouts"].append([engine.layout, estimate_resize.partitions(config.model, plan)])
        kept = (0, 2, 3)  # with the second block, state crosses every boundary
        guess = estimate_resize.removal_estimate(config, comm.world_size(), kept, blank())
        cut = estimate.plan_of(config, comm.world_size(), len(kept)).cut if pipe_stages > 1 else None
        engine, report = resize(engine, config, kept, cut)
        found["resizes"].append([report.bytes_minimum, asdict(guess)])
        destroy_engine(engine)
    return found
