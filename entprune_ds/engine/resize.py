"""Live resizing: the same processes go on with fewer blocks, and nothing that training has learned is lost."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace

import torch

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.engine.build import Engine, build_engine, destroy_engine
from entprune_ds.engine.transfer import fill, missing_bytes, park


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
    """Forward weights that DeepSpeed replicates, computed: a broadcast from rank 0 when an engine is built, and at
    ZeRO-1/2 the gathering of the written weights, each received by every other rank."""

    def metrics(self) -> dict[str, float]:
        """prune/resize_* values for the monitor."""
        return {f"prune/resize_{name}": value for name, value in asdict(self).items()}


def names_after(engine: Engine, kept_blocks: tuple[int, ...]) -> list[str]:
    """Names of the parameters that survive when only `kept_blocks` remain."""
    dropped = set(engine.kept_blocks) - set(kept_blocks)
    return [n for n in engine.shapes if not (n.startswith("blocks.") and int(n.split(".")[1]) in dropped)]


def resize(engine: Engine, config: Config, kept_blocks: tuple[int, ...]) -> tuple[Engine, ResizeReport]:
    """Continue with a subset of the blocks. Collective; `engine` is unusable afterwards.

    Survivors keep fp32 weights, Adam moments, step count and EMA; the EMA warm-up starts again. The old
    state is parked (`resize.park`), the old engine destroyed, a new one built at the new depth in the same
    processes, and the state written into its partitions.

    Args:
        kept_blocks: original indices, a proper subset of the present ones.

    Returns:
        The new engine and what it has cost.

    Raises:
        ValueError: on all ranks, when `kept_blocks` is not a proper non-empty subset of the present blocks.
        RuntimeError: on all ranks, in the middle of an accumulation of gradients.
    """
    start = time.perf_counter()
    if not kept_blocks or not set(kept_blocks) < set(engine.kept_blocks):
        raise ValueError(f"cannot keep blocks {list(kept_blocks)} of {list(engine.kept_blocks)}: not a proper subset.")
    if engine.ds.micro_steps % engine.ds.gradient_accumulation_steps():
        raise RuntimeError("a resize must stand between optimizer steps, not inside a gradient accumulation.")
    comm.assert_same_on_all_ranks([list(kept_blocks), engine.adam_step], "the state before a resize")
    names = names_after(engine, kept_blocks)
    step, have = engine.adam_step, engine.layout
    model_config = replace(engine.model_config, kept_blocks=tuple(sorted(kept_blocks)))
    settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    parked = park(engine, names, comm.device() if config.resize.park == "device" else torch.device("cpu"))
    building = time.perf_counter()
    destroy_engine(engine)
    new = build_engine(config, model_config)
    built = time.perf_counter()
    for group, values in zip(new.optimizer.param_groups, settings, strict=True):
        group.update(values)
    sent = fill(new, parked, have, step)
    total = sum(comm.all_gather_json(sent))
    minimum = missing_bytes(have, new.layout)
    seconds = time.perf_counter() - start
    return new, ResizeReport(seconds, built - building, total, minimum, framework_bytes(new))


def framework_bytes(engine: Engine) -> int:
    """Bytes received when the engine was built and its weights were written, see ResizeReport."""
    weights = sum(math.prod(s) for s in engine.shapes.values()) * engine.dtype.itemsize
    stage, others = int(engine.ds.zero_optimization_stage()), comm.world_size() - 1
    return weights * others * (2 if stage in (1, 2) else 1)
