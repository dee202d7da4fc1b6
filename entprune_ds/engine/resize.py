"""Live resizing: the same processes go on with fewer blocks, and nothing that training has learned is lost."""

from __future__ import annotations

import time
from dataclasses import replace

from entprune_ds import comm, fault_points
from entprune_ds.config import Config
from entprune_ds.engine.balance import Cut, cut_by_cost, measure_costs
from entprune_ds.engine.build import Engine, build_engine, destroy_engine
from entprune_ds.engine.ds_config import batch_plan, stages_at
from entprune_ds.engine.state import write_state
from entprune_ds.engine.transfer import exchange, park, reader


def names_after(engine: Engine, kept_blocks: tuple[int, ...]) -> list[str]:
    """Names of the parameters that survive when only `kept_blocks` remain."""
    dropped = set(engine.kept_blocks) - set(kept_blocks)
    return [n for n in engine.shapes if not (n.startswith("blocks.") and int(n.split(".")[1]) in dropped)]


def next_cut(engine: Engine, config: Config, kept_blocks: tuple[int, ...]) -> Cut | None:
    """The best cut of a pipeline when these blocks (sorted) remain, None without one. Collective, and inert.

    Costs are measured when the engine does not know them for the micro-batch, and kept with it.
    """
    if engine.cut is None or kept_blocks == engine.kept_blocks:
        return engine.cut
    world_size = comm.world_size()
    stages = stages_at(config, world_size, len(kept_blocks))
    if stages == 1:
        return None
    dp_size, model_config = world_size // stages, replace(engine.model_config, kept_blocks=kept_blocks)
    if engine.costs is None or engine.costs.micro_batch != batch_plan(config, dp_size)[0]:
        engine.costs = measure_costs(config, model_config, stages)
    if stages != len(engine.cut):  # every stage lies on other ranks
        return cut_by_cost(config, model_config, stages, dp_size, engine.costs)
    stage_of = [stage for stage, count in enumerate(engine.cut) for _ in range(count)]
    return cut_by_cost(
        config, model_config, stages, dp_size, engine.costs, dict(zip(engine.kept_blocks, stage_of, strict=True))
    )


def resize(
    engine: Engine, config: Config, kept_blocks: tuple[int, ...], cut: Cut | None = None
) -> tuple[Engine, float]:
    """Continue with a subset of the blocks, or with another cut of the pipeline. Collective; `engine` is spent.

    Survivors keep fp32 weights, Adam moments, step count and EMA; the EMA warm-up starts again. The old
    state is parked in host memory, the old engine destroyed, a new one built at the new depth in the same
    processes, and the state written into its partitions.

    Args:
        kept_blocks: original indices, a proper subset of the present ones; with another cut they may stay.
        cut: blocks per pipeline stage; None takes the best one by cost.

    Returns:
        The new engine and the seconds taken.

    Raises:
        ValueError: on all ranks, when `kept_blocks` is not a proper non-empty subset of the present blocks.
        RuntimeError: on all ranks, in the middle of an accumulation of gradients.
    """
    start = time.perf_counter()
    moves = cut is not None and cut != engine.cut and set(kept_blocks) == set(engine.kept_blocks)
    if not kept_blocks or not (moves or set(kept_blocks) < set(engine.kept_blocks)):
        raise ValueError(f"cannot keep blocks {list(kept_blocks)} of {list(engine.kept_blocks)}: not a proper subset.")
    if engine.ds.micro_steps % engine.ds.gradient_accumulation_steps():
        raise RuntimeError("a resize must stand between optimizer steps, not inside a gradient accumulation.")
    kept_blocks = tuple(sorted(kept_blocks))
    cut = next_cut(engine, config, kept_blocks) if cut is None else cut
    costs = engine.costs
    comm.assert_same_on_all_ranks([list(kept_blocks), cut, engine.adam_step], "the state before a resize")
    names = names_after(engine, kept_blocks)
    step, have = engine.adam_step, engine.layout
    model_config = replace(engine.model_config, kept_blocks=kept_blocks)
    parked = park(engine, names)
    destroy_engine(engine)
    new = build_engine(config, model_config, cut, costs)
    fault_points.reach("resize")
    parked = exchange(parked, have, new.layout)
    write_state(new.ds, new.optimizer, new.ema, step, reader(parked))
    comm.barrier()
    return new, time.perf_counter() - start
