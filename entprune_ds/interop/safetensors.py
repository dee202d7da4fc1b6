"""Exported models: a folder with model.safetensors (weights by original block index) and config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from entprune_ds.atomic import replacing
from entprune_ds.config import ConfigError, ModelConfig, config_from_dict, model_problems
from entprune_ds.interop.source import Source, description
from entprune_ds.interop.tensors import key_report, open_tensors, parameter_shapes, write_tensors
from entprune_ds.plain_json import parse_json

FORMAT = "entprune_ds/1"
FILES = ("model.safetensors", "config.json")


def save_model(out: Path, names: Iterable[str], read: Callable[[str], Tensor], model: ModelConfig, facts: dict) -> Path:
    """Write an export: both files whole under temporary names first, then renamed one after the other.

    Args:
        out: folder to write; an export in it is replaced.
        names: parameter names.
        read: name -> full fp32 tensor; called once per name, one tensor is held at a time.
        model: architecture, with kept_blocks.
        facts: plain values stored beside it (step, weights, commit, config digest, ...).

    Raises:
        OSError: when `out` cannot be written.
        ValueError: a name or tensor that does not belong to the architecture.
    """
    shapes = parameter_shapes(model)
    foreign = [name for name in names if name not in shapes]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: no parameters of this architecture.")
    out.mkdir(parents=True, exist_ok=True)
    text = {"format": FORMAT, **description(Source(model, read, facts))}
    with replacing(out / FILES[1]) as config, replacing(out / FILES[0]) as weights:  # the inner one is renamed first
        write_tensors(weights, {name: shapes[name] for name in names}, read)
        config.write_text(json.dumps(text, indent=2, allow_nan=False))
    return out


def write_export(out: Path, source: Source) -> Path:
    """Write a source as an export; see `save_model`."""
    return save_model(out, list(source.shapes), source.read, source.model, source.facts)


def read_description(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture and facts of a config.json, or of the description beside another format.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        facts = parse_json(path.read_text())
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, this version reads {FORMAT!r}")
        config = config_from_dict({"model": facts["model"]})
        wrong = model_problems(config.model)
        if wrong:
            raise ConfigError(wrong)
        missing = [key for key in ("weights", "step", "kept_blocks") if key not in facts]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    return config.model, facts


def read_export(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture and stored facts of an export.

    Raises:
        ValueError: when the folder is no complete export, saying what is missing.
    """
    for name in reversed(FILES):
        if not (folder / name).is_file():
            message = f"{folder} is not an exported model: {name} is missing. "
            raise ValueError(message + "Make one with `entprune-ds export run=runs/NAME out=DIR`.")
    return read_description(folder / "config.json")


def open_export(folder: Path) -> Source:
    """An export at rest.

    Raises:
        ValueError: listing missing, extra and mis-shaped parameters.
    """
    model, facts = read_export(folder)
    shapes, read = open_tensors(folder / "model.safetensors")
    problems = key_report(parameter_shapes(model), shapes)
    if problems:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: " + "; ".join(problems))
    return Source(model, read, {k: v for k, v in facts.items() if k not in ("format", "model", "kept_blocks")})
