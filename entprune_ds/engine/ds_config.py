"""DeepSpeed configuration files: found by name, checked, completed with the keys that we own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from entprune_ds.config import Config
from entprune_ds.plain_json import parse_json
from entprune_ds.soft_budget import least_depth

SHIPPED = (Path(__file__).parents[2] / "ds_configs", Path(__file__).parents[1] / "ds_configs")
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "wandb", "steps_per_print",
)  # fmt: skip


def find_ds_config(name: str) -> Path:
    """Path of a DeepSpeed configuration: a file, or the name of one in ds_configs/.

    Raises:
        ValueError: when there is none, listing the shipped names.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in SHIPPED:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = sorted({p.stem for folder in SHIPPED for p in folder.glob("*.json")})
    raise ValueError(f"`parallel.ds_config`: `{name}` is neither a file nor one of {', '.join(known)}.")


def read_ds_config(config: Config) -> dict[str, Any]:
    """The chosen JSON with parallel.zero_stage applied, before the batch keys.

    Raises:
        ValueError: for a missing or malformed file, owned keys, or a combination that is not supported.
    """
    path = find_ds_config(config.parallel.ds_config)
    try:
        values = parse_json(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"`parallel.ds_config`: {path} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"`parallel.ds_config`: {path} must hold a JSON object.")
    sections = {name: values.get(name, {}) for name in ("zero_optimization", "bf16", "fp16", "data_types")}
    wrong = [name for name, section in sections.items() if not isinstance(section, dict)]
    if wrong:
        raise ValueError(f"`parallel.ds_config`: {path}: {', '.join(wrong)} must be a JSON object.")
    zero = values["zero_optimization"] = dict(sections["zero_optimization"])
    bucket = zero.get("reduce_bucket_size", 1)
    if not isinstance(bucket, (int, float)) or not 1 <= bucket < 2**63:
        message = f"`parallel.ds_config`: {path}: zero_optimization.reduce_bucket_size must be a number of elements, "
        raise ValueError(f"{message}got {bucket!r}. Correct it, or take it out.")
    if config.parallel.zero_stage is not None:
        zero["stage"] = config.parallel.zero_stage
    problem = _unsupported(values, zero, zero.setdefault("stage", 0))
    if problem is not None:
        raise ValueError(f"`parallel.ds_config`: {path} {problem}")
    if zero["stage"] == 3 and config.model.compile:
        message = "`model.compile` is not supported with ZeRO stage 3, whose gathering breaks compiled blocks apart. "
        raise ValueError(message + "Set model.compile=false, or choose stage 0, 1 or 2.")
    if zero["stage"] > 1 and config.parallel.pipe_stages > 1:
        message = f"`parallel.pipe_stages` ({config.parallel.pipe_stages}) needs ZeRO stage 0 or 1, but {path} has "
        raise ValueError(message + f"stage {zero['stage']}. Set parallel.zero_stage=1, or parallel.pipe_stages=1.")
    return values


def _unsupported(values: dict[str, Any], zero: dict[str, Any], stage: Any) -> str | None:
    """What this version cannot run, with the remedy, or None."""
    owned = [key for key in OWNED if key in values]
    if owned:
        return f"sets {', '.join(owned)}, which train.* and monitor.* own. Remove them."
    if "bfloat16" in values:
        return 'uses the old name "bfloat16". Call it "bf16".'
    if type(stage) is not int or not 0 <= stage <= 3:
        return f"has the ZeRO stage {stage!r}. Give 0, 1, 2 or 3, or set parallel.zero_stage."
    if stage == 0 and values.get("bf16", {}).get("enabled") and accumulates_in_fp32(values):
        return (
            "accumulates bf16 gradients in fp32, which DeepSpeed cannot do at ZeRO stage 0. Remove "
            "data_types.grad_accum_dtype (as zero0_bf16 does), or choose stage 1, 2 or 3."
        )
    if values.get("fp16", {}).get("enabled"):
        return "enables fp16, which is not supported. Use bf16 or fp32."
    if any(zero.get(key) for key in ("offload_param", "cpu_offload", "cpu_offload_params")):
        return "offloads parameters, which is not supported. Keep offload_optimizer alone."
    offload = zero.get("offload_optimizer")
    if offload is not None and (not isinstance(offload, dict) or offload.get("device") not in ("cpu", "none")):
        return 'must give `offload_optimizer` as {"device": "cpu"}; other places are not supported.'
    if offload is not None and offload.get("ratio", 1.0) != 1.0:
        return (
            "gives offload_optimizer a `ratio`, with which a second optimizer steps a part that can neither be resized "
            "nor left out of a bad step (train.bad_steps). Remove it."
        )
    if stage == 0 and offloads(values):
        return "offloads the optimizer, which needs ZeRO stage 1, 2 or 3. Choose one, or remove offload_optimizer."
    return None


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Precision of the training forward pass."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def accumulates_in_fp32(values: dict[str, Any]) -> bool:
    """Whether 16-bit gradients are summed in fp32."""
    return (values.get("data_types") or {}).get("grad_accum_dtype") in ("fp32", "float32", "float")


def offloads(values: dict[str, Any]) -> bool:
    """Whether fp32 weights and moments live in host memory, where DeepSpeed's CPU Adam steps them."""
    return (values["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu"


def zero_stage(config: Config) -> int:
    """ZeRO stage of the run."""
    return int(read_ds_config(config)["zero_optimization"]["stage"])


def batch_plan(config: Config, dp_size: int, depth: int | None = None) -> tuple[int, int]:
    """(micro batch per rank, accumulation steps) for a data-parallel size, at the full depth or another one.

    Raises:
        ValueError: when the global batch does not divide, or the readers do not.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % dp_size:
        message = f"`train.global_batch_size` ({total}) must be a multiple of the data-parallel size ({dp_size}). "
        raise ValueError(message + "Change it, or the number of ranks.")
    if config.data.num_readers % dp_size:
        message = f"the data-parallel size ({dp_size}) must divide `data.num_readers` ({config.data.num_readers}). "
        raise ValueError(message + f"Set data.num_readers to a multiple of {dp_size} that divides {total}.")
    per_rank = total // dp_size
    micro = per_rank if micro is None else micro
    if per_rank % micro:
        message = f"`train.micro_batch_size` ({micro}) must divide `train.global_batch_size` / data-parallel size "
        raise ValueError(message + f"({total} / {dp_size} = {per_rank}).")
    if config.prune.regrow_micro_batch and depth is not None:
        room = micro * _activations(config, len(config.model.blocks)) / _activations(config, depth)
        micro = max(m for m in range(micro, per_rank + 1) if per_rank % m == 0 and (m <= room or m == micro))
    return micro, per_rank // micro


BLOCK_INPUTS = 20
"""Activations that a block keeps for its backward pass, in units of its input; counted by saved_tensors_hooks."""
WORKING_BLOCKS = 6
"""What an example needs beside what the blocks keep, in units of one block's activations. It must not be too small:
regrown micro-batches would not fit; tests compare it with what was measured (working_blocks of estimate.json)."""


def _activations(config: Config, depth: int) -> float:
    """Activations of one example at a depth, in units of one block's."""
    return WORKING_BLOCKS + (depth / BLOCK_INPUTS if config.model.activation_checkpointing else depth)


def stages_at(config: Config, world_size: int, depth: int) -> int:
    """Stages of a pipeline of `depth` blocks: parallel.pipe_stages, or fewer when there are fewer blocks.

    A shrunk pipeline takes the largest divisor of the world size that is at most the depth and whose data-parallel
    size fits the batch and the readers; the freed ranks become data-parallel replicas.

    Raises:
        ValueError: when no number of stages fits, with a remedy.
    """
    wanted = config.parallel.pipe_stages
    if world_size % wanted:
        message = f"`parallel.pipe_stages` ({wanted}) must divide the number of ranks ({world_size}). "
        raise ValueError(message + "Start another number of ranks, or change it.")
    if depth >= wanted:
        batch_plan(config, world_size // wanted)
        return wanted
    for count in range(depth, 0, -1):
        if world_size % count == 0 and _fits(config, world_size // count):
            return count
    message = f"`parallel.pipe_stages` ({wanted}) is more than {depth} blocks, and no smaller pipeline on {world_size} "
    message += f"ranks fits `train.global_batch_size` ({config.train.global_batch_size}), `train.micro_batch_size` and "
    raise ValueError(message + "`data.num_readers`. Lower it, raise prune.target_depth, or change the batch.")


def _fits(config: Config, dp_size: int) -> bool:
    try:
        batch_plan(config, dp_size)
    except ValueError:
        return False
    return True


def pipeline_problem(config: Config, world_size: int) -> str | None:
    """Why this pipeline cannot run, at its depth now and at every depth that pruning may reach, or None."""
    stages, depth = config.parallel.pipe_stages, len(config.model.blocks)
    if stages > depth:
        message = f"`parallel.pipe_stages` ({stages}) must be at most the {depth} blocks of the model. "
        return message + "Lower it."
    try:
        least = least_depth(config) if config.soft.every else config.prune.target_depth or depth
        for now in range(least, depth + 1):
            stages_at(config, world_size, now)
    except ValueError as problem:
        return str(problem)
    return None


def full_ds_config(config: Config, dp_size: int, depth: int | None = None) -> dict[str, Any]:
    """The configuration that deepspeed.initialize receives at the full depth or another one."""
    micro, accumulation = batch_plan(config, dp_size, depth)
    return read_ds_config(config) | {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
