"""The architecture of an official state dict, from its shapes and from what the file cannot say."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from entprune_ds.config import ModelConfig, model_problems
from entprune_ds.interop.tensors import Shapes
from entprune_ds.models.registry import FAMILIES, SIZES

HEADS = {width: heads for _, width, heads in SIZES.values()}
NEEDED = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2}
"""Tensors that fix the architecture, and their number of axes."""


def infer_architecture(
    shapes: Shapes, path: Path, arguments: dict[str, Any], given: dict[str, Any], assumed: ModelConfig | None
) -> tuple[ModelConfig, list[str]]:
    """Architecture of an official state dict.

    Heads and process leave no trace in the shapes: they come from `given`, else from the command line stored in a
    training checkpoint, else (heads) from the published size of that width, else from `assumed`.

    Args:
        shapes: {official name: shape}.
        path: the file, for messages.
        arguments: the stored command line, or empty.
        given: model settings that the user stated; those that the shapes fix must agree.
        assumed: the config of the running command, or None where nothing may be assumed.

    Returns:
        The architecture (all blocks, official numbering), and notes on what was assumed.

    Raises:
        ValueError: for another kind of model, and listing every setting that disagrees or is missing.
    """
    known = _from_shapes(shapes, path)
    problems, notes = [], []
    family, heads = _from_arguments(arguments)
    heads = given.get("num_heads") or heads or HEADS.get(known["hidden_size"])
    process = given.get("process") or family
    if family and process != family:
        problems.append(f"{path} was trained as {arguments['model']}, but `model.process` is {process}.")
    if assumed is not None and not heads:
        heads = assumed.num_heads
        notes.append(f"{path.name} does not hold the number of heads: taken from model.num_heads={heads}.")
    if assumed is not None and not process:
        process = assumed.process
        notes.append(f"{path.name} does not say whether it is a DiT or a SiT: taken from model.process={process}.")
    if not heads:
        message = f"`model.num_heads` is not in {path}, and no published model is {known['hidden_size']} wide. "
        problems.append(message + "Give it: model.num_heads=N.")
    if not process:
        message = f"{path} does not say whether it is a DiT or a SiT: both have the same names and shapes. "
        problems.append(message + "Give model.process=dit or model.process=sit.")
    if "input_size" not in known and "input_size" not in given:
        problems.append(f"{path} has no pos_embed, so its input size is unknown. Give model.input_size=N.")
    problems += [disagreement(k, given[k], known[k], path) for k in known if given.get(k, known[k]) != known[k]]
    if problems:
        raise ValueError(" ".join(problems))
    free = {f.name for f in fields(ModelConfig)} - {"kept_blocks", "weights"} - known.keys()
    chosen = {k: v for k, v in given.items() if k in free} | known
    model = ModelConfig(**{**chosen, "num_heads": heads, "process": process})
    wrong = model_problems(model)
    if wrong:
        raise ValueError(f"{path} has an impossible architecture: " + " ".join(wrong))
    return model, notes


def disagreement(key: str, wanted: object, found: object, path: Path) -> str:
    """A stated setting that the file contradicts, with a remedy."""
    text = f"`model.{key}` is {wanted}, but {path} has {found}."
    if key == "input_size":
        text += " Its positions belong to that size and are not interpolated: use latents of that size (pixels / 8), "
        return text + "or weights trained at the other one."
    return text + " Leave the setting out."


def _from_shapes(shapes: Shapes, path: Path) -> dict[str, Any]:
    """What the shapes fix; a num_classes row more is the null label."""
    odd = [n for n, axes in NEEDED.items() if len(shapes.get(n, ())) != axes or 0 in shapes[n]]
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in shapes) if m}
    fc1 = shapes.get(f"blocks.{min(blocks)}.mlp.fc1.weight", ()) if blocks else ()
    if odd or len(fc1) != 2:
        names = ", ".join([*odd, *(["blocks.N.mlp.fc1.weight"] if len(fc1) != 2 else [])])
        message = f"{path} is no DiT or SiT of the official code: {names} missing or of another kind. It holds "
        raise ValueError(message + f"{', '.join(sorted(shapes)[:4])}, ... ({len(shapes)} tensors).")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    known: dict[str, Any] = {"hidden_size": width, "in_channels": channels, "patch_size": patch}
    known["depth"] = max(blocks) + 1
    known["mlp_ratio"] = fc1[0] / width
    known["num_classes"] = shapes["y_embedder.embedding_table.weight"][0] - 1
    known["learn_sigma"] = shapes["final_layer.linear.weight"][0] == 2 * channels * patch * patch
    if "pos_embed" in shapes:
        known["input_size"] = math.isqrt(math.prod(shapes["pos_embed"]) // max(width, 1)) * patch
    return known


def _from_arguments(arguments: dict[str, Any]) -> tuple[str | None, int | None]:
    """Process and heads of the stored `--model`, e.g. "SiT-XL/2"."""
    match = re.fullmatch(r"(\w+)-(\w+)/\d+", str(arguments.get("model", "")))
    if match is None or match[1] not in FAMILIES or match[2] not in SIZES:
        return None, None
    return FAMILIES[match[1]], SIZES[match[2]][2]
