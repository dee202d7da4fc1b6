"""Exported models: a folder with model.safetensors (weights by original block index) and config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entprune_ds.config import ConfigError, ModelConfig, config_from_dict, model_problems, to_dict
from entprune_ds.models.dit import DiT

FORMAT = "entprune_ds/1"


def save_model(out: Path, names: Iterable[str], read: Callable[[str], Tensor], model: ModelConfig, facts: dict) -> Path:
    """Write an export: both files whole under temporary names first, then renamed one after the other.

    Args:
        out: folder to write; an export in it is replaced.
        names: parameter names.
        read: name -> full fp32 tensor.
        model: architecture, with kept_blocks.
        facts: plain values stored beside it (step, weights, commit, config digest, ...).
    """
    out.mkdir(parents=True, exist_ok=True)
    weights, config = out / ".model.safetensors.writing", out / ".config.json.writing"
    tensors = {name: read(name).contiguous() for name in names}
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {weights}: {error}") from error
    architecture = to_dict(model) | {"kept_blocks": list(model.blocks)}
    architecture.pop("weights")
    text = {"format": FORMAT, "model": architecture, "kept_blocks": list(model.blocks), **facts}
    config.write_text(json.dumps(text, indent=2, allow_nan=False))
    for path in (weights, config):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(weights, out / "model.safetensors")
    os.replace(config, out / "config.json")
    return out


def read_export(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture and stored facts of an export.

    Raises:
        ValueError: when the folder is no complete export, saying what is missing.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            message = f"{folder} is not an exported model: {name} is missing. "
            raise ValueError(message + "Make one with `entprune-ds export run=runs/NAME out=DIR`.")
    try:
        facts = json.loads((folder / "config.json").read_text())
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, this version reads {FORMAT!r}")
        config = config_from_dict({"model": facts["model"]})
        wrong = model_problems(config.model)  # how it samples is no matter of the export
        if wrong:
            raise ConfigError(wrong)
        model = config.model
        missing = [key for key in ("weights", "step", "kept_blocks") if key not in facts]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}.") from error
    return model, facts


def load_model(folder: Path) -> tuple[DiT, dict[str, Any]]:
    """The exported model in fp32 on the CPU, in evaluation mode, and its stored facts.

    Raises:
        ValueError: listing missing, extra and mis-shaped parameters.
    """
    config, facts = read_export(folder)
    problems = weight_problems(config, folder)
    if problems:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: " + "; ".join(problems))
    model, read = DiT(config), tensor_reader(folder)
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()}, strict=True)
    return model.eval().requires_grad_(False), facts


def weight_problems(config: ModelConfig, folder: Path) -> list[str]:
    """Missing, extra and mis-shaped parameters of an export, from its header alone.

    Raises:
        ValueError: when the file is damaged.
    """
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in DiT(config).named_parameters()}
    handle = _open(folder)
    return key_report(expected, {n: tuple(handle.get_slice(n).get_shape()) for n in handle.keys()})  # noqa: SIM118


def key_report(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """Every difference between two sets of parameters, as text: missing, extra, mis-shaped."""
    problems = [f"missing {n} {list(expected[n])}" for n in expected if n not in found]
    problems += [f"extra {n} {list(found[n])}" for n in found if n not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])} instead of {list(expected[name])}")
    return sorted(problems)


def tensor_reader(folder: Path) -> Callable[[str], Tensor]:
    """name -> full fp32 tensor of an export, one at a time by memory map.

    Raises:
        ValueError: when the file is damaged.
    """
    handle = _open(folder)
    return lambda name: handle.get_tensor(name).float()


def _open(folder: Path) -> Any:
    path = folder / "model.safetensors"
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged. Export it again.") from error


def architecture_problems(wanted: ModelConfig, folder: Path) -> list[str]:
    """How the architecture of an export differs from a config, both values listed; empty when it fits."""
    try:
        found, _ = read_export(folder)
        wrong = weight_problems(found, folder)
    except (OSError, ValueError) as error:
        return [f"`model.weights`: {error}"]
    if wrong:
        return [
            f"`model.weights`: {folder / 'model.safetensors'} does not fit its config.json: {'; '.join(wrong[:8])}."
        ]
    a, b = to_dict(wanted), to_dict(found)
    keys = [k for k in a if k not in ("weights", "kept_blocks") and a[k] != b[k]]
    problems = [f"`model.{k}` is {a[k]}, but `model.weights` ({folder}) has {b[k]}. Make them equal." for k in keys]
    missing = sorted(set(wanted.blocks) - set(found.blocks))
    if missing and not keys:
        message = f"`model.weights` ({folder}) no longer has blocks {missing}. "
        problems.append(message + f"Set model.kept_blocks={list(found.blocks)}, or a part of them.")
    return problems
