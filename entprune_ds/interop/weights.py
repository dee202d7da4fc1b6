"""`model.weights`: one function that opens any known format, and the checks of the commands that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entprune_ds.config import DiffusionConfig, ModelConfig, to_dict
from entprune_ds.interop.diffusers import open_diffusers, transformer_folder
from entprune_ds.interop.official import open_official
from entprune_ds.interop.safetensors import FORMAT, open_export
from entprune_ds.interop.source import NOT_ARCHITECTURE, Source
from entprune_ds.logs import get_logger
from entprune_ds.plain_json import parse_json

MEANING = ("path", "prediction")
"""Diffusion settings that say what the output of a model means."""
KNOWN = "Known: an export folder, an official .pt or .safetensors file, a diffusers DiTPipeline or transformer folder."


def open_weights(
    path: Path, weights: str | None = None, given: dict[str, Any] | None = None, assumed: ModelConfig | None = None
) -> Source:
    """Open a model of any known format.

    Args:
        path: folder or file.
        weights: "ema" or "raw" of an official training checkpoint; None prefers ema.
        given: model settings that the user stated; those that contradict the file are refused.
        assumed: config of the running command, for what a file cannot say (heads, process); None: must be given.

    Raises:
        ValueError: for anything that cannot be read, saying what is wrong and what to do.
    """
    given = given or {}
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return open_official(path, weights, given, assumed)
    if path.suffix == ".safetensors" and path.is_file():
        if _format(path.parent) is not None and path.name in (
            "model.safetensors",
            "diffusion_pytorch_model.safetensors",
        ):
            path = path.parent  # its config.json knows more
        else:
            return open_official(path, weights, given, assumed)
    if weights is not None:
        raise ValueError(f"{path} holds one set of weights. Leave `weights` out.")
    if (path / "model_index.json").is_file() or _format(transformer_folder(path)) == "diffusers":
        return open_diffusers(path, given)
    if path.is_dir():
        source = open_export(path)
        known = vars(source.model)
        wrong = [k for k, v in given.items() if k not in ("num_classes", "kept_blocks") and known[k] != v]
        if wrong:
            values = ", ".join(f"`model.{k}` is {given[k]}, but {path} has {known[k]}" for k in wrong)
            raise ValueError(f"{values}. Leave them out.")
        return source
    why = "it is of an unknown kind" if path.exists() else "it does not exist"
    raise ValueError(f"{path} is not an exported model, nor another known one: {why}. {KNOWN}")


def opened(path: Path, assumed: ModelConfig) -> Source:
    """The same for a command at work: what its user should know is logged.

    Raises:
        ValueError: as `open_weights`.
    """
    source = open_weights(path, assumed=assumed)
    for note in source.notes:
        get_logger().info(note)
    return source


def diffusion_problems(wanted: DiffusionConfig, source: Source, path: Path) -> list[str]:
    """Diffusion settings that differ from those a flow model was trained with, where its facts say them."""
    trained = source.facts.get("diffusion", {}) if source.model.process == "sit" else {}
    differ = {k: v for k, v in trained.items() if k in MEANING and getattr(wanted, k) != v}
    return [
        f"`diffusion.{k}` is {getattr(wanted, k)}, but {path} was trained with {v}. Set that value."
        for k, v in differ.items()
    ]


def starting_problems(wanted: ModelConfig, diffusion: DiffusionConfig, path: Path) -> list[str]:
    """Why a training cannot start from some weights; every difference with both values, empty when they fit."""
    try:
        source = open_weights(path, assumed=wanted)
    except (OSError, ValueError) as error:
        return [f"`model.weights`: {error}"]
    return architecture_problems(wanted, source.model, path) or diffusion_problems(diffusion, source, path)


def architecture_problems(wanted: ModelConfig, found: ModelConfig, path: Path) -> list[str]:
    """How the architecture of some weights differs from a config, both values listed; empty when it fits."""
    a, b = to_dict(wanted), to_dict(found.keeping(wanted.blocks))
    keys = [k for k in a if k not in (*NOT_ARCHITECTURE, "kept_blocks") and a[k] != b[k]]
    problems = []
    for key in keys:
        message = f"`model.{key}` is {a[key]}, but `model.weights` ({path}) has {b[key]}. Make them equal."
        change = f" For other classes, first: entprune-ds import src={path} out=DIR model.num_classes={a[key]}"
        problems.append(message + (change if key == "num_classes" else ""))
    missing = sorted(set(wanted.blocks) - set(found.blocks))
    if missing and not keys:
        message = f"`model.weights` ({path}) no longer has blocks {missing}. "
        problems.append(message + f"Set model.kept_blocks={list(found.blocks)}, or a part of them.")
    return problems


def _format(folder: Path) -> str | None:
    """ "export", "diffusers" or None, from config.json."""
    try:
        values = parse_json((folder / "config.json").read_text())
        return "diffusers" if "_class_name" in values else "export" if values.get("format") == FORMAT else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None
