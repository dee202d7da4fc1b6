"""Live resizing: the same processes go on with fewer or narrower blocks, and nothing that has been learned is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from entprune_ds import comm, fault_points
from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.balance import Cut, check_cut, cut_by_cost
from entprune_ds.engine.build import Engine, build_engine, destroy_engine
from entprune_ds.engine.ds_config import stages_at
from entprune_ds.engine.layer_costs import measure_costs
from entprune_ds.engine.transfer import fill, missing_bytes, narrowed_ranges, park
from entprune_ds.pruning.surgery import Narrowing, narrowed, selections


@dataclass(frozen=True)
class ResizeReport:
    """What a resize has cost; bytes are those of all ranks together."""

    seconds: float
    """Wall clock of this rank, from the call to the end of the last collective."""
    seconds_build: float
    """Part of it spent in destroying the old engine and building the new one."""
    bytes_state: int
    """State (fp32 weights, moments, EMA) that ranks have sent to each other, counted as it was sent."""
    bytes_minimum: int
    """State that ranks hold now and did not hold before: no method can send less."""
    bytes_framework: int
    """Forward weights that DeepSpeed replicates, computed: a broadcast from the first rank of every data-parallel group
    when an engine is built; the gathering of the written weights, or at ZeRO-3 that of every parameter when hooks are
    hung on it, and again of the small ones that stay whole. Each is received by every other rank."""

    def metrics(self) -> dict[str, float]:
        """prune/resize_* values for the monitor."""
        return {f"prune/resize_{name}": value for name, value in asdict(self).items()}


def names_after(engine: Engine, kept_blocks: tuple[int, ...]) -> list[str]:
    """Names of the parameters that survive when only `kept_blocks` remain."""
    dropped = set(engine.kept_blocks) - set(kept_blocks)
    return [n for n in engine.shapes if not (n.startswith("blocks.") and int(n.split(".")[1]) in dropped)]


def next_cut(engine: Engine, config: Config, model_config: ModelConfig) -> Cut | None:
    """The best cut of a pipeline for this architecture, None without a pipeline. Collective, and inert.

    Costs are measured when the engine does not know them for what it now trains, and kept with it.

    Args:
        model_config: that of the engine with fewer blocks (sorted), or with narrower ones.
    """
    if engine.cut is None or model_config == engine.model_config:
        return engine.cut
    world_size = comm.world_size()
    stages = stages_at(config, world_size, len(model_config.blocks))
    if stages == 1:
        return None
    dp_size = world_size // stages
    if engine.costs is None or not engine.costs.know(config, model_config, dp_size):
        engine.costs = measure_costs(config, model_config, stages)
    if stages != len(engine.cut):  # every stage lies on other ranks
        return cut_by_cost(config, model_config, stages, dp_size, engine.costs)
    stage_of = [stage for stage, count in enumerate(engine.cut) for _ in range(count)]
    return cut_by_cost(
        config, model_config, stages, dp_size, engine.costs, dict(zip(engine.kept_blocks, stage_of, strict=True))
    )


def resize(
    engine: Engine, config: Config, kept_blocks: tuple[int, ...], cut: Cut | None = None,
    narrow: Mapping[int, Narrowing] | None = None,
) -> tuple[Engine, ResizeReport]:  # fmt: skip
    """Continue with fewer or narrower blocks, or another cut of the pipeline. Collective; `engine` is spent.

    Survivors keep fp32 weights, Adam moments, step count and EMA; the EMA warm-up starts again. The old
    state is parked (`resize.park`), the old engine destroyed, a new one built at the new depth in the same
    processes, and the state written into its partitions.

    Args:
        kept_blocks: original indices, a proper subset of the present ones; with another cut or narrower blocks all
            may stay.
        cut: blocks per pipeline stage; None takes the best one by cost.
        narrow: heads and MLP channels that stay, by original index of the block; others stay as they are.

    Returns:
        The new engine and what it has cost.

    Raises:
        ValueError: on all ranks, when `kept_blocks` is not a proper non-empty subset of the present blocks, or a head
            or channel that shall stay is not there, or the cut does not fit.
        RuntimeError: on all ranks, in the middle of an accumulation of gradients.
        DistributedError: on all ranks, when they do not ask for the same.
    """
    start = time.perf_counter()
    kept_blocks, narrow = tuple(sorted(kept_blocks)), dict(sorted((narrow or {}).items()))
    asked = [list(kept_blocks), cut, [[block, stays.heads, stays.channels] for block, stays in narrow.items()]]
    comm.assert_same_on_all_ranks(asked, "the resize that is asked for")
    model_config = model_after(engine, kept_blocks, narrow, cut)
    if engine.ds.micro_steps % engine.ds.gradient_accumulation_steps():
        raise RuntimeError("a resize must stand between optimizer steps, not inside a gradient accumulation.")
    cut = next_cut(engine, config, model_config) if cut is None else cut
    check_cut(cut, stages_at(config, comm.world_size(), len(kept_blocks)), len(kept_blocks))
    costs = engine.costs
    comm.assert_same_on_all_ranks([cut, engine.adam_step], "the state before a resize")
    names, smaller = names_after(engine, kept_blocks), selections(engine.model_config, narrow)
    step, have = engine.adam_step, [narrowed_ranges(ranges, smaller) for ranges in engine.layout]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    parked = park(engine, names, comm.device() if config.resize.park == "device" else torch.device("cpu"), smaller)
    building = time.perf_counter()
    destroy_engine(engine)
    new = build_engine(config, model_config, cut, costs)
    built = time.perf_counter()
    fault_points.reach("resize")
    for group, values in zip(new.optimizer.param_groups, settings, strict=True):
        group.update(values)
    sent = fill(new, parked, have, step)
    total = sum(comm.all_gather_json(sent))
    minimum = missing_bytes(have, new.layout)
    seconds = time.perf_counter() - start
    return new, ResizeReport(seconds, built - building, total, minimum, framework_bytes(new))


def model_after(
    engine: Engine, kept_blocks: tuple[int, ...], narrow: Mapping[int, Narrowing], cut: Cut | None
) -> ModelConfig:
    """The architecture that a resize leads to. Local.

    Raises:
        ValueError: see `resize`.
    """
    present = engine.kept_blocks
    problem = f"cannot keep blocks {list(kept_blocks)} of {list(present)}: not a proper subset"
    if not kept_blocks or len(set(kept_blocks)) < len(kept_blocks) or not set(kept_blocks) <= set(present):
        raise ValueError(f"{problem}.")
    model_config = narrowed(engine.model_config, kept_blocks, narrow)
    if model_config == engine.model_config and cut in (None, engine.cut):
        raise ValueError(f"{problem}, no block gets narrower, and no other cut is asked for.")
    return model_config


def framework_bytes(engine: Engine) -> int:
    """Bytes received when the engine was built and its weights were written, see ResizeReport."""
    weights = sum(math.prod(s) for s in engine.shapes.values()) * engine.dtype.itemsize
    stage, others = int(engine.ds.zero_optimization_stage()), engine.dp_size - 1
    shards = stage or type(engine.ds.optimizer).__name__ == "BF16_Optimizer"  # of bf16 pipelines, at stage 0 too
    persistent = sum(p.ds_numel for p in engine.ds.optimizer.persistent_parameters) if stage == 3 else 0
    return others * (weights * (2 if shards else 1) + persistent * engine.dtype.itemsize)
