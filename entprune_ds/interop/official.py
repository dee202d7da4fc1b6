"""Models of the public DiT and SiT code: .pt files, and safetensors files with the same names, in and out.

The names are ours, but for `pos_embed`, which we compute, and for block numbers, which there count from 0 without gaps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entprune_ds.atomic import replacing
from entprune_ds.config import ModelConfig
from entprune_ds.interop.beside import read_beside, write_beside
from entprune_ds.interop.deviation import deviation_text, formula_deviation
from entprune_ds.interop.infer import disagreement, infer_architecture
from entprune_ds.interop.source import Source, check_full_width
from entprune_ds.interop.tensors import Reader, Shapes, key_report, open_tensors, parameter_shapes
from entprune_ds.interop.torch_file import read_torch_file, write_torch_file
from entprune_ds.models.layers import NORM_EPS, position_embedding

POSITIONS = "pos_embed"
SETTINGS = ("model", "image_size", "num_classes", "path_type", "prediction", "loss_weight", "vae")
"""Arguments of the public training scripts that say what the weights are; others may hold paths."""
WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
"""Prefixes that a wrapper around the model puts before every name of its state dict."""


def open_official(
    path: Path, weights: str | None = None, given: dict[str, Any] | None = None, assumed: ModelConfig | None = None
) -> Source:
    """A .pt or .safetensors file of the official code.

    Args:
        path: the file; NAME.json beside it, written by our export, gives the original block indices back.
        weights: "ema" or "raw" of a training checkpoint; None prefers ema.
        given: model settings that the user stated (num_classes and kept_blocks are changed later, by the caller).
        assumed: config of the running command, for what the file cannot say; None: then it must be given.

    Raises:
        ValueError: a damaged file, another architecture, or missing, extra and mis-shaped keys, all listed.
    """
    given = {k: v for k, v in (given or {}).items() if k not in ("num_classes", "kept_blocks", "weights")}
    shapes, read, kind, arguments = _open(path, weights)
    shapes, read, unwrapped = _without_wrapper(shapes, read, path)
    known = read_beside(path.with_suffix(".json"), shapes, official_shapes, lambda model: _reader(model, read))
    if known is not None:
        wrong = [
            disagreement(k, v, getattr(known.model, k), path) for k, v in given.items() if v != getattr(known.model, k)
        ]
        if wrong:
            raise ValueError(" ".join(wrong))
        return known
    model, notes = infer_architecture(shapes, path, arguments, given, assumed)
    expected = official_shapes(model)
    if POSITIONS not in shapes:
        expected.pop(POSITIONS)
    problems = key_report(expected, shapes)
    if problems:
        raise ValueError(f"{path} does not fit its architecture: " + "; ".join(problems))
    if POSITIONS in shapes:
        _check_positions(read(POSITIONS), model, path)
    trained = {k: v for k, v in arguments.items() if k in SETTINGS and isinstance(v, str | int | float)}
    facts = {"weights": kind, "step": 0, "source": f"official file {path.name}"}
    facts |= {"trained_with": trained} if trained else {}
    return Source(model, _reader(model, read), facts, (*unwrapped, *notes, *_objective_notes(trained)))


def write_official(out: Path, source: Source) -> tuple[Path, dict[str, Any], list[str]]:
    """Write OUT.pt (state dict, blocks renumbered) and OUT.json (kept_blocks, licence, commit, ..., deviation).

    Returns:
        The .pt file, the facts stored beside it, and what the user should know.

    Raises:
        OSError: when it cannot be written.
        ValueError: for a name that does not end in .pt, or a model with narrow blocks.
    """
    if out.suffix != ".pt":
        raise ValueError(f"`out` must end in .pt for the official format, got {out}.")
    check_full_width(source, "official")
    m = source.model
    notes = [f"The official code loads it with depth={len(m.blocks)}; nothing else changes."]
    deviation = formula_deviation(source, frequency_shift=0.0, norm_eps=NORM_EPS)
    if deviation:
        notes.append(deviation_text(deviation, "official"))
    tensors = {POSITIONS: position_embedding(m.hidden_size, m.input_size // m.patch_size)}
    tensors |= {official: source.read(name) for name, official in official_names(m).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        write_torch_file(temporary, tensors)
    return out, write_beside(out.with_suffix(".json"), source, deviation), notes


def official_names(model: ModelConfig) -> dict[str, str]:
    """{our parameter name: name in the official state dict}: blocks renumbered from 0."""
    position = {str(block): str(i) for i, block in enumerate(model.blocks)}
    return {
        name: re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{position[m[1]]}.", name)
        for name in parameter_shapes(model)
    }


def official_shapes(model: ModelConfig) -> Shapes:
    """{official name: shape} of an architecture."""
    names, side = official_names(model), model.input_size // model.patch_size
    shapes = {names[name]: shape for name, shape in parameter_shapes(model).items()}
    return {POSITIONS: (1, side * side, model.hidden_size), **shapes}


def _open(path: Path, weights: str | None) -> tuple[Shapes, Reader, str, dict[str, Any]]:
    if path.suffix == ".safetensors":
        if weights is not None:
            raise ValueError(f"{path} holds one set of weights. Leave `weights` out.")
        shapes, read = open_tensors(path)
        return shapes, read, "plain", {}
    file = read_torch_file(path, weights)
    tensors = file.tensors
    return {n: tuple(t.shape) for n, t in tensors.items()}, lambda n: tensors[n].float(), file.weights, file.arguments


def _without_wrapper(shapes: Shapes, read: Reader, path: Path) -> tuple[Shapes, Reader, list[str]]:
    """The tensors under the names of the model itself, with a note, where a wrapper's prefix is on every name."""
    taken, notes = "", []
    while prefix := next((p for p in WRAPPERS if any(name.startswith(taken + p) for name in shapes)), None):
        taken += prefix
        others = [name for name in shapes if not name.startswith(taken)]
        if others:
            some = ", ".join(sorted(others)[:8]) + (", ..." if len(others) > 8 else "")
            message = f"{path}: {len(shapes) - len(others)} of {len(shapes)} names begin with `{taken}`, the others do "
            raise ValueError(f"{message}not: {some}. Save the state dict of one model, without its wrapper.")
        notes.append(f"All names in {path.name} began with `{prefix}` ({WRAPPERS[prefix]}): it was taken off.")
    return {n.removeprefix(taken): shape for n, shape in shapes.items()}, lambda name: read(taken + name), notes


def _reader(model: ModelConfig, read: Reader) -> Reader:
    names = official_names(model)
    return lambda name: read(names[name])


def _check_positions(found: Tensor, model: ModelConfig, path: Path) -> None:
    expected = position_embedding(model.hidden_size, model.input_size // model.patch_size)
    difference = float((found - expected).abs().max())
    if not difference <= _rounding(found):
        message = f"{path}: pos_embed differs from the fixed sin-cos positions by up to {difference:.3g}. "
        raise ValueError(message + "Learned or interpolated positions are not supported.")


def _rounding(positions: Tensor) -> float:
    """How far positions in [-1, 1] may be from the formula: its own noise in fp32, and the rounding to 16 bits.

    The values tell the precision, so that a 16-bit file saved again as fp32 counts as what it is. bf16 is asked first:
    positions rounded to it are exact in fp16 too, but not the other way round. Half of eps is the rounding next to 1.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(positions, positions.to(dtype).float()):
            return 1e-5 + torch.finfo(dtype).eps / 2  # 0.0039, 0.0005
    return 1e-5


def _objective_notes(trained: dict[str, Any]) -> list[str]:
    """Settings that a SiT trained with other than the default objective needs."""
    keys = {
        "path_type": ("path", "linear"),
        "prediction": ("prediction", "velocity"),
        "loss_weight": ("loss_weight", "none"),
    }
    found = {
        key: str(trained[k]).lower()
        for k, (key, default) in keys.items()
        if str(trained.get(k, default)).lower() != default
    }
    if not found:
        return []
    return [
        "It was trained with another objective: give " + " ".join(f"diffusion.{k}={v}" for k, v in found.items()) + "."
    ]
