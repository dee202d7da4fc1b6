"""Everything that can be known to be wrong before a process group or a GPU is touched."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from entprune_ds.config import Config, config_from_dict, problems_of, to_dict
from entprune_ds.data.index import Index, check_shards, load_index
from entprune_ds.engine.checkpoint import step_folders
from entprune_ds.engine.ds_config import pipeline_problem, read_ds_config
from entprune_ds.importance.criteria import CRITERIA
from entprune_ds.importance.stack_memory import stack_problem
from entprune_ds.interop.weights import starting_problems
from entprune_ds.launcher import launch_problems
from entprune_ds.plain_yaml import read_yaml
from entprune_ds.pruning.schedule import schedule_problem
from entprune_ds.ranking import needed_criteria
from entprune_ds.rollback import rollback_pending, rollback_problem
from entprune_ds.teacher import teacher_problems

CHECKSUM_LIMIT = 2**30
"""Shards up to this many bytes are verified whole before the start; larger ones when first opened."""

FREE_SECTIONS = ("parallel", "monitor", "evaluate", "sample", "compare")
PRUNING_SECTIONS = ("prune", "score", "race", "learned", "soft", "distill")
"""Settings that may change when a run goes back to the checkpoint before a removal."""
FREE_KEYS = (
    "run.name", "run.root", "run.timeout_seconds", "data.shards", "data.val_shards", "data.out", "data.shard_size",
    "data.source", "data.src", "data.image_size", "data.num_classes", "data.val_fraction", "data.max_unreadable",
    "data.max_pixels", "data.encode_batch", "data.encode_dtype", "data.num_workers", "data.prefetch",
    "data.max_skipped", "data.allow_pipe", "model.weights", "model.compile", "model.activation_checkpointing",
    "train.num_steps", "train.stop_step", "train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints",
    "train.validate_every", "train.validation_draws", "prune.rollback", "distill.teacher", "distill.placement",
    "prune.method", "score.criteria", "score.weights", "score.out",
    "train.bad_steps", "train.spike_deviations", "train.max_rollbacks",
)  # fmt: skip


def training_problems(config: Config, data_needed: bool = True) -> list[str]:
    """Problems of a training run: values, DeepSpeed configuration, batch, shards, weights, run folder.

    Args:
        config: the resolved settings.
        data_needed: whether missing `data.shards` are a problem; those that are given are always looked at.
    """
    if found := launch_problems():
        return found
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = problems_of(config)
    if found:
        return found
    try:
        read_ds_config(config)
    except (OSError, ValueError) as error:
        found.append(str(error))
    if (problem := pipeline_problem(config, world_size)) is not None:
        found.append(problem)
    prune = config.prune
    if prune.target_depth is not None and config.score.batch_size < world_size:
        message = f"`score.batch_size` must be at least the number of ranks ({world_size}), "
        found.append(message + f"got {config.score.batch_size}.")
    if prune.criterion == "recovery_race" and config.race.validation_draws < world_size:
        message = f"`race.validation_draws` must be at least the number of ranks ({world_size}), "
        found.append(message + f"got {config.race.validation_draws}.")
    if config.train.validation_draws < world_size:
        found.append(f"`train.validation_draws` must be at least the number of ranks ({world_size}).")
    if (problem := schedule_problem(config)) is not None:
        found.append(problem)
    waits = prune.target_depth is not None and prune.recovery_tolerance is not None
    if waits and config.data.shards and not validation_spec(config):
        message = "`prune.recovery_tolerance` looks at the validation loss, but there is no validation data. Set "
        found.append(message + "data.val_shards, or prune.recovery_tolerance=null.")
    if config.data.shards or data_needed:
        found += data_problems(config)
    resuming = bool(step_folders(config.run_dir / "checkpoints"))
    if config.model.weights and not resuming:
        found += starting_problems(config.model, config.diffusion, Path(config.model.weights))
    found += _criterion_problems(config, world_size, trained=bool(config.model.weights) or resuming)
    found += teacher_problems(config)
    problem = rollback_problem(config)
    return found + _resume_problems(config) + ([problem] if problem else [])


def _criterion_problems(config: Config, world_size: int, trained: bool) -> list[str]:
    """What the criterion of a pruning run lacks; a user's file is loaded."""
    prune = config.prune
    if prune.target_depth is None or config.soft.every:
        return []
    try:
        needed = needed_criteria(config)
    except ValueError as error:
        return [str(error)]
    found = []
    if config.score.sweep == "always" or any(c.needs_sweep for c in needed):
        problem = stack_problem(config, world_size, len(config.model.blocks))
        found += [problem] if problem is not None else []
    if any(c.needs_entropy for c in needed) and prune.start_step == 0 and not trained:
        message = f"`prune.criterion` {prune.criterion} cannot score an untrained model at step 0. "
        found.append(message + "Give model.weights, or let the model train first: set prune.start_step.")
    if CRITERIA["learned"] in needed and config.learned.batch_size < world_size:
        message = f"`learned.batch_size` must be at least the number of ranks ({world_size}), "
        found.append(message + f"got {config.learned.batch_size}.")
    return found


def validation_spec(config: Config) -> str:
    """data.val_shards, or the folder `val` beside the training folder where that exists, or empty."""
    beside = Path(config.data.shards).parent / "val"
    return config.data.val_shards or (str(beside) if (beside / "index.json").is_file() else "")


def data_problems(config: Config) -> list[str]:
    """Shards that are missing or damaged, or do not fit the model."""
    if not config.data.shards:
        return [
            "`data.shards` is empty. Give a folder written by `entprune-ds shards`, e.g. data.shards=data_digits/train."
        ]
    specs = {"data.shards": config.data.shards, "data.val_shards": validation_spec(config)}
    found = []
    for key, spec in specs.items():
        if not spec:
            continue
        try:
            index = load_index(spec, config.data.allow_pipe)
        except (ValueError, OSError) as error:
            found.append(f"`{key}`: {error}")
            continue
        small = sum(s.bytes for s in index.shards) <= CHECKSUM_LIMIT
        found += check_shards(index, checksums=small and os.environ.get("RANK", "0") == "0")
        found += _fit_problems(config, index, key)
    return found


def _fit_problems(config: Config, index: Index, key: str) -> list[str]:
    model, found = config.model, []
    wanted = (model.in_channels, model.input_size, model.input_size)
    if index.latent_shape != wanted:
        message = f"`{key}`: {index.folder} holds examples of shape {list(index.latent_shape)}, but the model takes "
        found.append(f"{message}{list(wanted)}. Set model.in_channels and model.input_size, or choose other shards.")
    if index.num_classes > model.num_classes:
        message = (
            f"`{key}`: {index.folder} has {index.num_classes} classes, but `model.num_classes` is {model.num_classes}."
        )
        found.append(message + " Raise it.")
    if key == "data.shards" and config.data.flip and index.kind == "latents":
        message = f"`data.flip` needs shards of pixels or moments, but {index.folder} holds latents. "
        found.append(message + "Set it to false, or encode the images again as moments.")
    if key == "data.shards" and len(index.shards) < config.data.num_readers:
        message = f"`data.num_readers` ({config.data.num_readers}) is more than the {len(index.shards)} shards in "
        found.append(message + f"{index.folder}. Lower it, or write smaller shards with data.shard_size.")
    return found


def _resume_problems(config: Config) -> list[str]:
    """Differences from the config of an existing run folder that a resume cannot follow, both values listed."""
    path = config.run_dir / "config.yaml"
    if not path.is_file() or not step_folders(config.run_dir / "checkpoints"):
        return []  # nothing to resume
    try:
        old = config_from_dict(read_yaml(path.read_text()))
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        return [f"{path} cannot be read ({why}). Move the run folder away or choose another `run.name`."]
    found, now, before = [], to_dict(config), to_dict(old)
    free = (*FREE_SECTIONS, *PRUNING_SECTIONS) if rollback_pending(config) else FREE_SECTIONS
    for section, values in now.items():
        for key, value in values.items():
            name, was = f"{section}.{key}", before[section][key]
            if value != was and section not in free and name not in FREE_KEYS:
                message = f"`{name}` is {value}, but {config.run_dir} was started with {was}. "
                back = " go back with `prune.rollback`," if section in PRUNING_SECTIONS else ""
                found.append(message + f"Use that value,{back} or choose another `run.name`.")
    steps, old_steps = config.train.num_steps, old.train.num_steps
    if steps < old_steps:
        message = f"`train.num_steps` is {steps}, but {config.run_dir} was started with {old_steps}. "
        found.append(message + "A resume may only raise it.")
    elif steps > old_steps and _end_moves(config):
        message = f"`train.num_steps` was raised from {old_steps} to {steps}, which would move the pruning checks. "
        found.append(message + "Finish that run, and start another with its model (model.weights) to train on.")
    return found


def _end_moves(config: Config) -> bool:
    """Whether the end of the pruning follows train.num_steps."""
    if config.soft.every:
        return config.soft.end_step is None
    return config.prune.target_depth is not None and config.prune.end_step is None
