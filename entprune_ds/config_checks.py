"""Every impossible value or combination of settings that can be known without data, GPUs or other ranks."""

from __future__ import annotations

from typing import Any

from entprune_ds.config_schema import Config

MAX_DEPTH = 4096
CRITERIA = ("ced", "ced_abs", "loss", "random", "every_other", "explicit")


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

    plain_name = (
        bool(config.run.name) and config.run.name not in (".", "..") and not set(config.run.name) & set("/\\\0")
    )
    require(plain_name, f"`run.name` must be one folder name, got {config.run.name!r}.")
    positive("run", config.run, "timeout_seconds")
    keys = ("depth", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "input_size", "in_channels", "num_classes")
    positive("model", model, *keys)
    require(model.depth <= MAX_DEPTH, f"`model.depth` must be at most {MAX_DEPTH}, got {model.depth}.")
    one_of("model.process", model.process, ("sit",))
    if not found:
        divides = model.hidden_size % model.num_heads == 0
        require(
            divides, f"`model.num_heads` must divide `model.hidden_size` ({model.hidden_size}), got {model.num_heads}."
        )
        require(model.hidden_size % 4 == 0, f"`model.hidden_size` must be a multiple of 4, got {model.hidden_size}.")
        divides = model.input_size % model.patch_size == 0
        require(
            divides, f"`model.patch_size` must divide `model.input_size` ({model.input_size}), got {model.patch_size}."
        )
    if model.kept_blocks is not None:
        kept = model.kept_blocks
        ok = len(kept) > 0 and list(kept) == sorted(set(kept)) and all(0 <= b < model.depth for b in kept)
        require(
            ok,
            f"`model.kept_blocks` must be sorted block indices below `model.depth` ({model.depth}), got {list(kept)}.",
        )

    positive("data", data, "num_readers", "shuffle_buffer", "shard_size")
    positive("train", train, "num_steps", "global_batch_size", "micro_batch_size", "learning_rate", "checkpoint_every")
    positive("train", train, "keep_checkpoints", "validation_draws")
    require(train.validate_every >= 0, f"`train.validate_every` must be at least 0, got {train.validate_every}.")
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
    found += _pruning_problems(config) if not found else []

    one_of("sample.sampler", config.sample.sampler, ("euler", "heun"))
    one_of("sample.labels", config.sample.labels, ("uniform", "balanced"))
    positive("sample", config.sample, "num_steps", "num_samples", "batch_size", "grid")
    positive("evaluate", config.evaluate, "latency_repeats")
    bad_batches = [b for b in config.evaluate.latency_batches if b < 1]
    require(not bad_batches, f"`evaluate.latency_batches` must be above 0, got {bad_batches}.")
    positive("monitor", config.monitor, "log_every")
    require(
        config.monitor.sample_every >= 0,
        f"`monitor.sample_every` must be at least 0, got {config.monitor.sample_every}.",
    )
    return found


def _pruning_problems(config: Config) -> list[str]:
    prune, depth = config.prune, len(config.model.blocks)
    found: list[str] = []
    if prune.criterion not in CRITERIA:
        found.append(f"`prune.criterion` must be one of {', '.join(CRITERIA)}, got {prune.criterion}.")
    if prune.score_dtype not in ("float32", "float64"):
        found.append(f"`prune.score_dtype` must be float32 or float64, got {prune.score_dtype}.")
    minima = dict(
        num_checks=1, calibration_draws=2, calibration_batch=1, ntk_samples=2, ntk_repeats=1,
        zico_batches=2, zico_batch_size=1, max_blocks_per_check=1,
    )  # fmt: skip
    for key, least in minima.items():
        got = getattr(prune, key)
        if got is not None and got < least:
            found.append(f"`prune.{key}` must be at least {least}, got {got}.")
    if min(prune.vote_weights) < 0 or sum(prune.vote_weights) <= 0:
        found.append(f"`prune.vote_weights` must be at least 0 and not both 0, got {list(prune.vote_weights)}.")
    if prune.vote_tolerance < 0:
        found.append(f"`prune.vote_tolerance` must be at least 0, got {prune.vote_tolerance}.")
    if prune.target_depth is None or found:
        return found
    if not 1 <= prune.target_depth < depth:
        if prune.target_depth < 1:
            found.append(f"`prune.target_depth` must be at least 1, got {prune.target_depth}. Raise it.")
            return found
        message = f"`prune.target_depth` must be below the {depth} blocks of the model, got {prune.target_depth}. "
        found.append(message + "Lower it.")
        return found
    if prune.calibration_draws % prune.calibration_batch or prune.calibration_draws < 2 * prune.calibration_batch:
        message = "`prune.calibration_batch` must divide `prune.calibration_draws` into at least 2 groups "
        found.append(message + f"({prune.calibration_draws}), got {prune.calibration_batch}.")
    end = config.train.num_steps if prune.end_step is None else prune.end_step
    if not 0 <= prune.start_step < end <= config.train.num_steps:
        message = "`prune.start_step` < `prune.end_step` <= `train.num_steps` must hold, got "
        found.append(message + f"{prune.start_step}, {end}, {config.train.num_steps}.")
    elif end - prune.start_step < prune.num_checks:
        message = f"`prune.num_checks` ({prune.num_checks}) needs as many steps of pruning phase, "
        found.append(message + f"got {end - prune.start_step}.")
    cap, to_remove = prune.max_blocks_per_check, depth - prune.target_depth
    if cap is not None and cap * prune.num_checks < to_remove:
        message = f"`prune.max_blocks_per_check` x `prune.num_checks` must reach {to_remove} blocks, "
        found.append(message + f"got {cap} x {prune.num_checks}. Raise one of them.")
    if prune.criterion == "explicit":
        order = prune.explicit_order
        if len(set(order)) != len(order) or not set(order) <= set(config.model.blocks) or len(order) < to_remove:
            message = f"`prune.explicit_order` must list at least {to_remove} different present blocks, "
            found.append(message + f"got {list(order)}.")
    return found
