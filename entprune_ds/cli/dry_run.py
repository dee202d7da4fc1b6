"""`train --dry-run`: what the settings, the data and the weights amount to, and what the run will need."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from entprune_ds import estimate, estimate_resize
from entprune_ds.config import Config, ConfigError, load_config, to_yaml
from entprune_ds.data.index import load_index
from entprune_ds.engine.checkpoint import step_folders
from entprune_ds.estimate_teacher import teacher_memory
from entprune_ds.importance.stack_memory import stack_rows, stream_bytes
from entprune_ds.interop.weights import open_weights
from entprune_ds.models.registry import count_parameters
from entprune_ds.preflight import training_problems
from entprune_ds.pruning.schedule import blocks_per_check, planned_checks
from entprune_ds.ranking import needed_criteria
from entprune_ds.redact import redacted
from entprune_ds.rollback import rollback_pending
from entprune_ds.teacher import first_step, teacher_path

ROWS = {
    "weights": "weights", "gradients": "gradients", "master": "fp32 weights", "moments": "Adam moments", "ema": "EMA",
    "activations": "activations", "gathered": "gathered blocks", "buffers": "buffers", "total": "total",
}  # fmt: skip
"""Fields of estimate.Memory and what they are called."""


def describe(words: list[str]) -> int:
    """Print the resolved settings and what they mean, checked as for a start; returns the exit status.

    Raises:
        ConfigError: listing every problem.
    """
    world_size, local = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 0)
    if local and world_size % local:
        message = f"`LOCAL_WORLD_SIZE` ({local}, ranks of a node) must divide `WORLD_SIZE` ({world_size}). "
        raise ConfigError([message + "Set both, or neither."])
    config = load_config(words, check=partial(training_problems, data_needed=False))
    if os.environ.get("RANK", "0") == "0":
        print(to_yaml(config), end="")
        print(f"# {count_parameters(config.model):,} parameters")
        print(*layout_lines(config, world_size), *need_lines(config, world_size, local), sep="\n")
        print(*check_lines(config, world_size), sep="\n", end="\n" if planned_checks(config) else "")
        print(_data_line(config), _weights_line(config), *_teacher_lines(config, world_size), sep="\n")
    return 0


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < min(1, default):
        raise ConfigError(
            [f"`{variable}` is {text!r}; set it to a number of ranks, or take it out of the environment."]
        )
    return int(text)


def layout_lines(config: Config, world_size: int) -> list[str]:
    """How the run lies on its ranks."""
    plan = estimate.plan_of(config, world_size)
    stages = len(plan.cut)
    ranks = f"{stages} stage(s) x {plan.dp_size}" if stages > 1 else f"{world_size}"
    batch = f"micro-batch {plan.micro_batch} x accumulation {plan.accumulation}"
    line = f"# ZeRO-{plan.zero_stage}, {ranks} rank(s) x {batch}"
    if stages == 1:
        return [line]
    cut = "+".join(map(str, plan.cut))
    idle = (stages - 1) / (stages - 1 + plan.accumulation)
    remedy = " (a smaller train.micro_batch_size means more accumulation and less idling)" if idle > 0.2 else ""
    return [
        line,
        f"# blocks per stage: {cut}, an even cut; the run cuts by measured cost",
        f"# stages of equal cost idle {idle:.0%} of the time{remedy}",
    ]


def need_lines(config: Config, world_size: int, local: int = 0) -> list[str]:
    """Memory of a rank, what a resize takes, and where the constants come from.

    Args:
        local: ranks of a node, when they are known.
    """
    constants = estimate.load_constants()
    stages = estimate.rank_memory(config, world_size, constants["memory"])
    memory = max(stages, key=lambda m: m.total)
    number = f" of pipeline stage {stages.index(memory)}, the largest" if len(stages) > 1 else ""
    lines = [f"# memory of one rank{number}, estimated, above a process that has only imported everything:"]
    lines += [f"#   {label:<22}{_size(getattr(memory, field)):>12}" for field, label in ROWS.items()]
    if local:
        lines.append(f"# on a node of {local} such ranks {_size(local * memory.total)}")
    node = f", {_size(local * memory.host)} on a node of {local} ranks" if local else ""
    if memory.offloaded:
        what = f"{_size(memory.total - memory.host)} on the device, {_size(memory.host)} in host memory"
        lines.append(f"# of it {what}{node} (fp32 weights, Adam moments, EMA)")
    if memory.reserved:
        lines.append(
            f"# on a GPU {_size(memory.reserved)} more: zero_optimization.reduce_bucket_size is allocated whole"
        )
    if config.model.compile:
        lines.append("# model.compile is not accounted for")
    return lines + _resize_lines(config, world_size, local, constants) + _source_lines(constants)


def _resize_lines(config: Config, world_size: int, local: int, constants: dict) -> list[str]:
    if config.soft.every:
        return ["# resizes: at most soft.removals, of what the mask has closed by then; their cost is known only then"]
    resize = estimate_resize.resize_estimate(config, world_size, constants)
    if resize is None:
        return ["# a resize: none, for nothing is removed (prune.target_depth, prune.score_only)"]
    depth = len(config.model.blocks)
    node = f" ({_size(local * resize.parked)} on a node of {local} ranks)" if local else ""
    where = "host memory" if config.resize.park == "host" else "the memory of the device"
    return [
        f"# a resize from {depth} to {resize.depth} blocks: about {resize.seconds:.2g} s; between ranks travel",
        f"#   {_size(resize.moved)} of state, and a rank parks at most {_size(resize.parked)} in {where}{node}",
    ]


def check_lines(config: Config, world_size: int) -> list[str]:
    """When the checks stand, what each may remove, and what its sweep takes; empty without any."""
    steps, depth = planned_checks(config), len(config.model.blocks)
    if not steps:
        return []
    listed = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
    most, left = blocks_per_check(config.prune, depth), config.train.num_steps - steps[-1]
    lines = [f"# checks at steps {listed}: each removes at most {most} of {depth} blocks; {left} steps follow the last"]
    if config.score.sweep == "always" or any(c.needs_sweep for c in needed_criteria(config)):
        stack = stack_rows(config, depth) * stream_bytes(config, world_size)
        lines.append(f"#   the sweep of a check takes {_size(stack)} more on a rank (score.batch_size, score.sweep)")
    return lines


def _source_lines(constants: dict) -> list[str]:
    m = constants["measured"]
    return [
        f"# constants: CPU runs of {m['date']} on {m['machine']}, torch {m['torch']}, deepspeed {m['deepspeed']};",
        f"#   largest error of the total over {m['held_out_cases']} runs not used for them: {m['largest_error']:.0%}.",
        "#   Buffers include what the allocator of the CPU keeps of freed memory. Times are of that machine",
        f"#   (error {m['largest_error_seconds']:.0%} at most in the runs they are fitted to);",
        "#   measure yours: python tools/measure_memory.py --write",
    ]


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _data_line(config: Config) -> str:
    if not config.data.shards:
        return "# data: none given yet (data.shards)"
    index = load_index(config.data.shards, config.data.allow_pipe)
    shape = "x".join(map(str, index.shape))
    counts = f"{index.total:,} examples in {len(index.shards):,} shards, {index.num_classes:,} classes"
    return f"# data: {counts}, {index.kind} of shape {shape}: {redacted(config.data.shards)}"


def _weights_line(config: Config) -> str:
    checkpoints = step_folders(config.run_dir / "checkpoints")
    if rollback_pending(config):
        return f"# weights: {config.run_dir} goes back to {config.prune.rollback}; later checkpoints move aside"
    if checkpoints:
        return f"# weights: {config.run_dir} goes on from {checkpoints[-1].name}"
    if not config.model.weights:
        return f"# weights: random, seed {config.run.seed}"
    source = open_weights(Path(config.model.weights), assumed=config.model)
    m, facts = source.model, source.facts
    size = f"{m.process}, patch {m.patch_size}, width {m.hidden_size}, {m.num_heads} heads"
    depth = f"depth {len(m.blocks)} of {m.depth}"
    return f"# weights: {size}, {depth}, step {facts['step']}, {facts['weights']}: {config.model.weights}"


def _teacher_lines(config: Config, world_size: int) -> list[str]:
    distill = config.distill
    if distill.kind == "none":
        return []
    path = teacher_path(config)
    teacher = open_weights(path, assumed=config.model).model
    memory = teacher_memory(config, teacher, world_size)
    first = first_step(config, teacher, ())
    since = "the first removal" if first is None else f"step {first}"
    return [
        f"# teacher ({distill.kind}, {distill.placement}), from {since} on: depth {len(teacher.blocks)}: {path}",
        f"#   it takes {_size(memory.weights)} of weights and {_size(memory.activations)} of activations on a rank, "
        "beside the total",
    ]
