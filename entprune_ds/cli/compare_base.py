"""The bases of `entprune-ds compare`: how they are trained, and where they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from entprune_ds.config import Config, ConfigError, config_from_dict, to_dict
from entprune_ds.plain_yaml import read_yaml

OTHERS = "Use those again, or choose another `out`."


def base_config(config: Config, further: int | None = None) -> Config:
    """Settings of the base that the comparison trains, or of a further one with a seed of its own."""
    compare = config.compare
    name, seed = ("base", compare.seeds[0]) if further is None else (f"base_{further}", further)
    return replace(
        config,
        run=replace(config.run, name=name, root=compare.out, seed=seed),
        model=replace(config.model, depth=compare.base_depth, kept_blocks=None, block_widths=(), weights=""),
        train=replace(config.train, num_steps=compare.base_steps, stop_step=None),
        prune=replace(config.prune, target_depth=None), soft=replace(config.soft, every=0),
        distill=replace(config.distill, kind="none"), monitor=replace(config.monitor, wandb=False),
    )  # fmt: skip


def base_path(config: Config) -> Path:
    """Where the base lies, or will lie."""
    return Path(config.compare.base or Path(config.compare.out) / "base" / "model")


def further_base(out: Path, seed: int) -> Path:
    """Folder of a further base's model."""
    return out / f"base_{seed}" / "model"


def other_base(config: Config) -> list[str]:
    """Whether the base that was trained here, or has begun to be, is another than this command would train."""
    path = Path(config.compare.out) / "base" / "config.yaml"
    if config.compare.base or not path.is_file():
        return []
    try:
        made = config_from_dict(read_yaml(path.read_text()))
    except (ConfigError, ValueError, TypeError) as error:
        return [f"`compare.out`: {path} cannot be read ({str(error).splitlines()[0]}). Choose another `out`."]
    old, new = _of_base(made), _of_base(base_config(config))
    wrong = [f"`{key}` {old[key]}, not {new[key]}" for key in new if new[key] != old[key]]
    return [f"`compare.out`: {path.parent} was made with {'; '.join(wrong)}. {OTHERS}"] if wrong else []


def _of_base(config: Config) -> dict[str, Any]:
    """What makes a base what it is, by the names of the command's settings."""
    names = {
        "train.num_steps": "compare.base_steps",
        "model.depth": "compare.base_depth",
        "run.seed": "compare.seeds[0]",
    }
    values = {f"{s}.{k}": v for s in ("model", "train", "diffusion") for k, v in to_dict(getattr(config, s)).items()}
    unread = ("model.weights", "train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints")
    values = {k: v for k, v in values.items() if k not in unread} | {"run.seed": config.run.seed}
    return {names.get(key, key): value for key, value in values.items()}
