"""Tensor files without their meaning: safetensors read by memory map and written one tensor at a time; key reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entprune_ds.config import ModelConfig
from entprune_ds.interop.mistaken import mistaken_for
from entprune_ds.models.dit import DiT

Shapes = dict[str, tuple[int, ...]]
Reader = Callable[[str], Tensor]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """{parameter name: shape} of an architecture; builds nothing but meta tensors."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DiT(config).named_parameters()}


def open_tensors(path: Path) -> tuple[Shapes, Reader]:
    """Shapes of a safetensors file from its header, and a reader: name -> f32 tensor.

    An f32 tensor is a read-only view of the mapped file: it costs no memory of its own and must not be changed.

    Raises:
        ValueError: when the file is damaged or half-written, or holds other than floating-point numbers.
    """
    try:
        handle = safe_open(path, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        mistaken = mistaken_for(path) if path.is_file() else None
        if mistaken is not None:
            raise ValueError(mistaken) from error
        raise ValueError(f"{path} cannot be read ({error}): it is damaged. Export it again.") from error
    wrong = sorted(name for name, part in slices.items() if part.get_dtype() not in ("F64", "F32", "F16", "BF16"))
    if wrong:
        raise ValueError(
            f"{path} holds other than floating-point numbers in {', '.join(wrong)}: it is no model of ours."
        )
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return shapes, lambda name: handle.get_tensor(name).float()


def write_tensors(path: Path, shapes: Shapes, read: Reader) -> None:
    """Write a safetensors file of f32 tensors, holding one tensor at a time.

    The library's save_file takes the whole state at once, and refuses tensors that share memory. The format is a
    little-endian u64 length, a JSON header of that length, and the data in the order of the header
    (https://huggingface.co/docs/safetensors, "Format").

    Args:
        path: file to write; on an error it is left half-written, so write to a temporary name.
        shapes: {name: shape} in the order of the file.
        read: name -> f32 tensor of that shape.

    Raises:
        ValueError: a tensor of another shape or type.
        OSError: when the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name).detach().cpu().contiguous()
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                found = f"{list(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} must be {list(shape)} float32 to be written to {path}, got {found}.")
            file.write(tensor.view(-1).numpy().data)


def key_report(expected: Shapes, found: Shapes) -> list[str]:
    """Every difference between two sets of parameters, as text: missing, extra, mis-shaped."""
    problems = [f"missing {n} {list(expected[n])}" for n in expected if n not in found]
    problems += [f"extra {n} {list(found[n])}" for n in found if n not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])} instead of {list(expected[name])}")
    return sorted(problems)
