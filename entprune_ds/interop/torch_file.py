"""The only place that opens or writes .pt files: plain tensors and an argparse.Namespace, nothing else is unpickled."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entprune_ds.interop.mistaken import mistaken_for


@dataclass(frozen=True)
class TorchFile:
    """What a .pt file of the public code holds."""

    tensors: dict[str, Tensor]
    """The chosen state dict, memory-mapped."""
    weights: str
    """Which one it is: ema, raw, or plain (a file that holds one state dict and does not say)."""
    arguments: dict[str, Any]
    """Command line of the training that wrote it; empty for a plain state dict."""


def read_torch_file(path: Path, weights: str | None) -> TorchFile:
    """Open a plain state dict or a training checkpoint {model, ema, opt, args} by memory map.

    Args:
        path: the file.
        weights: "ema" or "raw" of a training checkpoint; None prefers ema.

    Raises:
        ValueError: a file that is damaged, holds other objects than plain tensors, or lacks the chosen weights.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict. Save model.state_dict().")
    groups = {
        name: content[key] for name, key in (("ema", "ema"), ("raw", "model")) if isinstance(content.get(key), dict)
    }
    if not groups:
        if weights is not None:
            raise ValueError(f"{path} is a plain state dict with one set of weights. Leave `weights` out.")
        return TorchFile(_plain(content, path), "plain", {})
    if weights is not None and weights not in groups:
        raise ValueError(f"{path} holds no {weights} weights. Choose weights={', '.join(groups)}.")
    chosen = weights or next(iter(groups))
    arguments = content.get("args")
    named = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return TorchFile(_plain(groups[chosen], path), chosen, named)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    mistaken = mistaken_for(path)
    if mistaken is not None:
        raise ValueError(mistaken)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file may raise anything: KeyError, EOFError, UnpicklingError, ...
        why = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1].split(" Please ")[0][:300]
        why = why.split("(1)")[0].split("Re-running")[0].strip()  # torch's advice is to unpickle it after all
        if "zipfile_serialization" in why:  # not a zip file
            why = "it does not begin as a .pt file does"
        message = (
            f"{path} cannot be read: it is damaged, half-written, or holds other objects than plain tensors, which "
        )
        raise ValueError(message + f"are not unpickled ({type(error).__name__}: {why}).") from error


def _plain(tensors: dict, path: Path) -> dict[str, Tensor]:
    """The state dict, after a look at every entry.

    Raises:
        ValueError: listing entries that are not dense floating-point tensors.
    """
    wrong = [str(name) for name, value in tensors.items() if not _is_plain(name, value)]
    if wrong or not tensors:
        raise ValueError(
            f"{path}: these entries are not plain floating-point tensors: {', '.join(wrong) or 'none at all'}."
        )
    return {name: value.detach() for name, value in tensors.items()}


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    tensor: Tensor = value  # type: ignore[assignment]
    return tensor.layout == torch.strided and tensor.is_floating_point() and tensor.is_contiguous()


def write_torch_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a plain state dict.

    Raises:
        OSError: when the disk is full or not writable.
    """
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from error
