"""Models into and out of every format: a checkpoint, an export, an official file or a diffusers folder to any of them.

Weights only, one process, no DeepSpeed engine; one tensor is held at a time where the format allows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from entprune_ds.config import Config, config_from_dict, digest, model_problems, to_dict
from entprune_ds.engine.checkpoint import Checkpoint, SafetensorError, range_reader
from entprune_ds.environment import commit
from entprune_ds.interop.diffusers_export import write_diffusers
from entprune_ds.interop.finite import check_finite
from entprune_ds.interop.official import write_official
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source, architecture, change_classes, keep_blocks
from entprune_ds.interop.tensors import Shapes, key_report, parameter_shapes
from entprune_ds.interop.weights import open_weights
from entprune_ds.pruning.folding import column_factors
from entprune_ds.pruning.soft_mask import SoftState

DAMAGE = (LookupError, TypeError, AttributeError, RuntimeError, OverflowError, SafetensorError)
"""What a manifest that says something else than it should can raise."""
FORMATS = ("entprune", "official", "diffusers")
INHERITED = ("source", "source_license", "trained_with", "label_table")
"""Facts of the starting weights that hold for everything trained from them."""


def export_checkpoint(checkpoint: Checkpoint, out: Path, weights: str) -> Path:
    """Write model.safetensors and config.json. Local.

    Args:
        checkpoint: an intact checkpoint.
        out: folder of the export.
        weights: "ema" or "raw".

    Raises:
        OSError: when `out` cannot be written.
    """
    return write_export(out, checkpoint_source(checkpoint, weights))


def checkpoint_source(checkpoint: Checkpoint, weights: str) -> Source:
    """The weights of a checkpoint at rest: "ema" or "raw", with the gates of soft pruning folded in. Local.

    Raises:
        ValueError: when its manifest does not describe a model and its pieces.
    """
    key = {"ema": "ema", "raw": "weight"}[weights]
    try:
        record = checkpoint.manifest["record"]
        config = config_from_dict(record["config"])
        model = checkpoint.model(config.model)
        wrong = model_problems(model) or key_report(parameter_shapes(model), _shapes(checkpoint))
        gates = SoftState.from_json(record["soft"]).gates() if record.get("soft") else {}
        read_range = range_reader(checkpoint, (key,))
    except (*DAMAGE, ValueError) as error:
        raise ValueError(_unusable(checkpoint, f"{type(error).__name__}: {error}")) from error
    if wrong:
        raise ValueError(_unusable(checkpoint, "; ".join(wrong)))
    shapes = parameter_shapes(model)

    def read(name: str) -> Tensor:
        try:
            tensor = read_range(name, 0, math.prod(shapes[name]))[key].view(shapes[name])
        except DAMAGE as error:
            raise ValueError(_unusable(checkpoint, f"{name}: {type(error).__name__}: {error}")) from error
        factors = column_factors(name, gates, config.model.head_size)
        return tensor if factors is None else tensor * factors.to(tensor.dtype)

    facts = _inherited(config) | {
        "weights": weights,
        "step": checkpoint.step,
        "diffusion": to_dict(config)["diffusion"],
        "config_digest": digest(record["config"]),
        "commit": commit(),
    }
    return Source(model, read, facts)


def _shapes(checkpoint: Checkpoint) -> Shapes:
    return {name: tuple(shape) for name, shape in checkpoint.manifest["shapes"].items()}


def _unusable(checkpoint: Checkpoint, why: str) -> str:
    return f"{checkpoint.folder} cannot be used: its manifest does not fit ({why}). Restore it, or name another one."


def _inherited(config: Config) -> dict[str, Any]:
    """Source and licence of the weights that a training started from."""
    if not config.model.weights:
        return {}
    try:
        facts = open_weights(Path(config.model.weights), assumed=config.model).facts
    except (ValueError, OSError):
        return {"source_license": "unknown: the weights that the training started from cannot be read any more"}
    return {key: facts[key] for key in INHERITED if key in facts}


def import_model(
    path: Path, out: Path, *, given: dict[str, Any], weights: str | None = None, seed: int = 0, source_license: str = ""
) -> Source:
    """Turn weights of any known format into an export folder.

    Args:
        path: an official .pt or safetensors file, a diffusers folder, or an export.
        out: folder to write.
        given: model settings that the user stated; num_classes re-makes the label table, kept_blocks drops the others.
        weights: "ema" or "raw" of an official training checkpoint; None prefers ema.
        seed: seed of a new label table.
        source_license: licence of the weights, stored with everything made from them.

    Returns:
        What was written, with notes for the user.

    Raises:
        ValueError: when the source cannot be read or does not fit, or holds NaN or infinite values.
        OSError: when `out` cannot be written.
    """
    source = open_weights(path, weights, given)
    source = change(source, given, seed)
    check_finite(source, str(path))
    facts = source.facts | {"config_digest": digest(architecture(source.model)), "commit": commit()}
    facts |= {"source_license": source_license} if source_license else {}
    source = replace(source, facts=facts)
    write_export(out, source)
    return source


def change(source: Source, given: dict[str, Any], seed: int = 0) -> Source:
    """Drop blocks and change the classes as stated."""
    source = keep_blocks(source, given["kept_blocks"]) if given.get("kept_blocks") is not None else source
    return change_classes(source, given.get("num_classes", source.model.num_classes), seed)


def write_model(source: Source, out: Path, format: str, vae: Path | None = None) -> list[str]:
    """Write a model in one of FORMATS; returns what the user should know.

    Raises:
        ValueError: when the format cannot hold this model, or it has NaN or infinite values.
        OSError: when `out` cannot be written.
    """
    check_finite(source, "the model to be exported")
    source = replace(source, facts=source.facts | {"commit": commit()})
    if format == "official":
        return [*source.notes, *write_official(out, source)[2]]
    if format == "diffusers":
        return [*source.notes, *write_diffusers(out, source, vae)[2]]
    write_export(out, source)
    return list(source.notes)
