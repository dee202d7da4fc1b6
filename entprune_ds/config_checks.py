"""Every impossible value or combination of settings that can be known without data, GPUs or other ranks."""

from __future__ import annotations

from typing import Any

from entprune_ds.config_checks_evaluation import evaluation_problems
from entprune_ds.config_checks_prune import pruning_problems
from entprune_ds.config_schema import Config, ModelConfig

MOST_OF_MODEL = {
    "depth": 4096, "hidden_size": 2**17, "mlp_ratio": 1024, "input_size": 2**12, "in_channels": 2**16,
    "num_classes": 10**8,
}  # fmt: skip
"""Larger values are typing errors: no machine could hold the model, nor count it."""
MAX_TIMESTEPS = 1000
SAMPLERS = {"sit": ("euler", "heun", "dopri5", "sde"), "dit": ("ddpm", "ddim")}
SDE_DIFFUSIONS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


def problems_of(config: Config) -> list[str]:
    """Every impossible value or combination that can be known without data, GPUs or other ranks."""
    model, train, data = config.model, config.train, config.data
    found: list[str] = []

    def require(ok: bool, message: str) -> None:
        if not ok:
            found.append(message)

    def positive(section: str, values: Any, *keys: str) -> None:
        for key in keys:
            got = getattr(values, key)
            require(got is None or got > 0, f"`{section}.{key}` must be above 0, got {got}.")

    def one_of(key: str, got: Any, known: tuple) -> None:
        require(got in known, f"`{key}` must be one of {', '.join(map(str, known))}, got {got}.")

    name = config.run.name
    plain_name = bool(name) and name == name.strip() and name not in (".", "..") and not set(name) & set("/\\\0")
    require(plain_name, f"`run.name` must be one folder name, got {name!r}.")
    positive("run", config.run, "timeout_seconds")
    found += model_problems(model)
    if model.process in SAMPLERS:
        found += _diffusion_problems(config)
    positive("data", data, "num_readers", "shuffle_buffer", "shard_size", "latent_scale", "prefetch")
    for key in ("num_workers", "max_skipped"):
        got = getattr(data, key)
        require(got >= 0, f"`data.{key}` must be at least 0, got {got}.")
    found += image_problems(config)
    positive("train", train, "num_steps", "global_batch_size", "micro_batch_size", "learning_rate", "checkpoint_every")
    positive("train", train, "stop_step", "keep_checkpoints", "validation_draws")
    require(train.validate_every >= 0, f"`train.validate_every` must be at least 0, got {train.validate_every}.")
    for key in ("bad_steps", "spike_deviations", "max_rollbacks"):
        require(getattr(train, key) >= 0, f"`train.{key}` must be at least 0, got {getattr(train, key)}.")
    require(train.grad_clip >= 0, f"`train.grad_clip` must be at least 0, got {train.grad_clip}.")
    require(train.warmup_steps >= 0, f"`train.warmup_steps` must be at least 0, got {train.warmup_steps}.")
    require(train.weight_decay >= 0, f"`train.weight_decay` must be at least 0, got {train.weight_decay}.")
    low = 0 <= train.min_learning_rate <= train.learning_rate
    require(low, f"`train.min_learning_rate` must lie in [0, train.learning_rate], got {train.min_learning_rate}.")
    require(all(0 <= b < 1 for b in train.betas), f"`train.betas` must lie in [0, 1), got {list(train.betas)}.")
    for key in ("label_dropout", "ema_decay"):
        got = getattr(train, key)
        require(0 <= got < 1, f"`train.{key}` must lie in [0, 1), got {got}.")
    one_of("train.lr_schedule", train.lr_schedule, ("constant", "cosine"))
    if train.global_batch_size > 0 and data.num_readers > 0:
        ok = train.global_batch_size % data.num_readers == 0
        message = "`data.num_readers` must divide `train.global_batch_size` "
        require(ok, message + f"({train.global_batch_size}), got {data.num_readers}.")
    if config.parallel.zero_stage is not None:
        one_of("parallel.zero_stage", config.parallel.zero_stage, (0, 1, 2, 3))
    positive("parallel", config.parallel, "pipe_stages")
    found += pruning_problems(config) if not found else []

    one_of("resize.park", config.resize.park, ("host", "device"))
    one_of("sample.labels", config.sample.labels, ("uniform", "balanced"))
    positive("sample", config.sample, "num_steps", "num_samples", "batch_size", "grid")
    positive("evaluate", config.evaluate, "latency_repeats")
    bad_batches = [b for b in config.evaluate.latency_batches if b < 1]
    require(not bad_batches, f"`evaluate.latency_batches` must be above 0, got {bad_batches}.")
    found += evaluation_problems(config)
    positive("monitor", config.monitor, "log_every")
    slow = config.monitor
    require(slow.slow_every >= 0, f"`monitor.slow_every` must be at least 0, got {slow.slow_every}.")
    require(slow.slow_factor > 1, f"`monitor.slow_factor` must be above 1, got {slow.slow_factor}.")
    require(
        config.monitor.sample_every >= 0,
        f"`monitor.sample_every` must be at least 0, got {config.monitor.sample_every}.",
    )
    every, peak = config.monitor.blocks_every, config.monitor.peak_tflops
    require(every >= 0, f"`monitor.blocks_every` must be at least 0, got {every}.")
    require(peak is None or 0 < peak < 1e6, f"`monitor.peak_tflops` must be above 0 (of one device), got {peak}.")
    return found


def image_problems(config: Config) -> list[str]:
    """What `shards` and `encode` do with images."""
    data, found = config.data, []
    choices = {"source": ("digits", "folder", "csv", "webdataset"), "encode_dtype": ("float32", "bfloat16")}
    for key, known in choices.items():
        if getattr(data, key) not in known:
            found.append(f"`data.{key}` must be one of {', '.join(known)}, got {getattr(data, key)}.")
    for key in ("image_size", "num_classes", "max_pixels", "encode_batch"):
        got = getattr(data, key)
        if got is not None and got < 1:
            found.append(f"`data.{key}` must be above 0, got {got}.")
    for key in ("val_fraction", "max_unreadable"):
        if not 0 <= getattr(data, key) < 1:
            found.append(f"`data.{key}` must lie in [0, 1), got {getattr(data, key)}.")
    return found


def model_problems(model: ModelConfig) -> list[str]:
    """Impossible values of an architecture alone."""
    found: list[str] = []

    def require(ok: bool, message: str) -> None:
        if not ok:
            found.append(message)

    for key in (
        "depth", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "input_size", "in_channels", "num_classes",
        "norm_eps",
    ):  # fmt: skip
        got = getattr(model, key)
        require(got > 0, f"`model.{key}` must be above 0, got {got}.")
    for key, most in MOST_OF_MODEL.items():
        got = getattr(model, key)
        require(got <= most, f"`model.{key}` must be at most {most}, got {got}.")
    shift = model.frequency_shift
    require(0 <= shift <= 1, f"`model.frequency_shift` must lie in [0, 1], got {shift}.")
    known = model.process in SAMPLERS
    require(known, f"`model.process` must be one of {', '.join(SAMPLERS)}, got {model.process}.")
    halves = model.process != "dit" or model.learn_sigma
    require(halves, "`model.learn_sigma` must be true with `model.process=dit`, got False.")
    if not found:
        width, heads, patch = model.hidden_size, model.num_heads, model.patch_size
        require(width % heads == 0, f"`model.num_heads` must divide `model.hidden_size` ({width}), got {heads}.")
        ratio = model.mlp_ratio
        require(model.mlp_size > 0, f"`model.mlp_ratio` leaves no MLP at `model.hidden_size` {width}, got {ratio}.")
        require(width % 4 == 0, f"`model.hidden_size` must be a multiple of 4, got {width}.")
        divides = model.input_size % patch == 0
        require(divides, f"`model.patch_size` must divide `model.input_size` ({model.input_size}), got {patch}.")
    if model.kept_blocks is not None:
        kept = list(model.kept_blocks)
        ok = len(kept) > 0 and kept == sorted(set(kept)) and all(0 <= b < model.depth for b in kept)
        message = f"`model.kept_blocks` must be sorted block indices below `model.depth` ({model.depth}), got {kept}."
        require(ok, message)
    return found or _width_problems(model)


def _width_problems(model: ModelConfig) -> list[str]:
    """Narrow blocks that the model does not have, or that are wider than they can be."""
    found, indices = [], [block for block, _, _ in model.block_widths]
    if indices != sorted(set(indices)) or not set(indices) <= set(model.blocks):
        message = f"`model.block_widths` must name present blocks ({list(model.blocks)}) in order, each once, "
        found.append(message + f"got {indices}.")
    full = (model.num_heads, model.mlp_size)
    for block, heads, channels in model.block_widths:
        if not (1 <= heads <= full[0] and 1 <= channels <= full[1]) or (heads, channels) == full:
            message = f"`model.block_widths` of block {block} must be 1 to {full[0]} heads and 1 to {full[1]} MLP "
            message += f"channels, not all of both, got {heads} and {channels}. Leave blocks of full width out."
            found.append(message)
    return found


def _diffusion_problems(config: Config) -> list[str]:
    """Objective and sampler, which hang on the process."""
    diffusion, sample, process = config.diffusion, config.sample, config.model.process
    choices = {
        "diffusion.path": (diffusion.path, ("linear", "gvp", "vp")),
        "diffusion.prediction": (diffusion.prediction, ("velocity", "score", "noise")),
        "diffusion.loss_weight": (diffusion.loss_weight, ("none", "velocity", "likelihood")),
        "sample.sampler": (sample.sampler, SAMPLERS[process]),
        "sample.sde_diffusion": (sample.sde_diffusion, SDE_DIFFUSIONS),
        "sample.sde_last_step": (sample.sde_last_step, ("none", "mean", "tweedie", "euler")),
    }
    found = [
        f"`{k}` must be one of {', '.join(known)}, got {got}."
        for k, (got, known) in choices.items()
        if got not in known
    ]
    low, high = sample.cfg_interval
    if not 0 <= low < high <= 1:
        found.append(f"`sample.cfg_interval` must be two numbers 0 <= low < high <= 1, got {[low, high]}.")
    if not 0 <= sample.ddim_eta <= 1:
        found.append(f"`sample.ddim_eta` must lie in [0, 1], got {sample.ddim_eta}.")
    if sample.cfg_channels is not None and not 1 <= sample.cfg_channels <= config.model.in_channels:
        message = f"`sample.cfg_channels` must lie in [1, {config.model.in_channels}] or be null, "
        found.append(message + f"got {sample.cfg_channels}.")
    if process == "dit" and not 2 <= sample.num_steps <= MAX_TIMESTEPS:
        message = f"`sample.num_steps` must lie in [2, {MAX_TIMESTEPS}] with `model.process=dit`, "
        found.append(message + f"got {sample.num_steps}.")
    if sample.sampler == "sde" and sample.sde_last_step != "none" and sample.num_steps == 1:
        found.append("`sample.num_steps` must be at least 2 with `sample.sde_last_step`, which is one of them, got 1.")
    if sample.sde_last_step_size >= 1:
        found.append(f"`sample.sde_last_step_size` must be below 1, got {sample.sde_last_step_size}.")
    for key in ("atol", "rtol", "sde_norm", "sde_last_step_size"):
        if getattr(sample, key) <= 0:
            found.append(f"`sample.{key}` must be above 0, got {getattr(sample, key)}.")
    return found
