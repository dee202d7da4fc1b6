"""Weights of any format behind one interface: architecture, facts, and a reader of single tensors by our names.

Every reader makes a Source, every writer takes one; dropping blocks and changing the classes happen in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entprune_ds.config import NOT_ARCHITECTURE, ModelConfig, digest, to_dict
from entprune_ds.interop.tensors import Reader, Shapes, parameter_shapes
from entprune_ds.models.dit import DiT, initial_tensor
from entprune_ds.models.layers import position_embedding

TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Source:
    """A model at rest."""

    model: ModelConfig
    """Architecture, with kept_blocks by original index."""
    read: Reader
    """Parameter name -> f32 tensor, often a read-only view of the file."""
    facts: dict[str, Any]
    """Plain values stored with it: weights, step, source, source_license, commit, config_digest, ..."""
    notes: tuple[str, ...] = ()
    """What its user should know, one sentence each."""

    @property
    def shapes(self) -> Shapes:
        """{parameter name: shape}."""
        return parameter_shapes(self.model)


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The architecture as plain values, blocks listed, without settings of a run."""
    values = to_dict(model) | {"kept_blocks": list(model.blocks)}
    return {k: v for k, v in values.items() if k not in NOT_ARCHITECTURE}


def description(source: Source) -> dict[str, Any]:
    """What an export carries besides weights: architecture, kept_blocks, and the facts."""
    facts = {"config_digest": digest(architecture(source.model)), "source_license": "not stated"} | source.facts
    return {"model": architecture(source.model), "kept_blocks": list(source.model.blocks), **facts}


def keep_blocks(source: Source, kept: tuple[int, ...]) -> Source:
    """The source with these blocks only (original indices).

    Raises:
        ValueError: for blocks that the source does not have, naming those it has.
    """
    missing = sorted(set(kept) - set(source.model.blocks))
    if missing or not kept or list(kept) != sorted(set(kept)):
        have = f"the source has blocks {list(source.model.blocks)}"
        raise ValueError(
            f"`model.kept_blocks` must be sorted original indices of blocks of the source, got {list(kept)}; {have}."
        )
    dropped = sorted(set(source.model.blocks) - set(kept))
    if not dropped:
        return source
    note = f"Dropped blocks {dropped}: depth {len(kept)} of originally {source.model.depth}."
    return replace(source, model=source.model.keeping(kept), notes=(*source.notes, note))


def check_full_width(source: Source, format: str) -> None:
    """Refuse narrow blocks in a format that has one width for all.

    Raises:
        ValueError: naming the narrow blocks.
    """
    narrow = [block for block, _, _ in source.model.block_widths]
    if narrow:
        message = f"the {format} format has one number of heads and of MLP channels for all blocks, but of this model "
        message += f"blocks {narrow} are narrower. Use format=entprune, or drop them with model.kept_blocks=[...]."
        raise ValueError(message)


def change_classes(source: Source, num_classes: int, seed: int) -> Source:
    """The source with another number of classes: a new label table, whose last row stays the null label's.

    Args:
        num_classes: classes of the new data.
        seed: seed of the new rows, drawn as at the start of a training (normal, 0.02).
    """
    old = source.model.num_classes
    if num_classes == old:
        return source

    def read(name: str) -> Tensor:
        if name != TABLE:
            return source.read(name)
        table = initial_tensor(TABLE, (num_classes + 1, source.model.hidden_size), seed)
        table[-1] = source.read(TABLE)[-1]
        return table

    note = f"The label table was made anew for {num_classes} classes instead of {old} (random, seed {seed}): the model "
    note += "knows none of them before training. The null label's row was kept."
    facts = source.facts | {"label_table": f"new for {num_classes} classes, seed {seed}"}
    model = replace(source.model, num_classes=num_classes)
    return replace(source, model=model, read=read, facts=facts, notes=(*source.notes, note))


def model_on_file(source: Source) -> DiT:
    """The model with its weights left in the mapped file where the format allows; for inference only."""
    return _built(source, {name: source.read(name) for name in source.shapes})


def loaded_model(source: Source) -> DiT:
    """The model in fp32 on the CPU with weights of its own, in evaluation mode."""
    return _built(source, {name: source.read(name).clone() for name in source.shapes})


def _built(source: Source, weights: dict[str, Tensor]) -> DiT:
    """The model around these tensors; nothing is initialised or copied."""
    with torch.device("meta"):
        model = DiT(source.model)
    model.load_state_dict(weights, strict=True, assign=True)
    model.pos_embed = position_embedding(source.model.hidden_size, model.side)
    return model.eval().requires_grad_(False)
