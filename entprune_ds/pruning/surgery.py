"""Narrower blocks: which attention heads and MLP channels stay, and where the rest of each parameter goes.

Index arithmetic only. What stays keeps its order, so elements that are contiguous in a flattened parameter stay so: a
rank narrows the part of a parameter that it holds without seeing the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entprune_ds.config import ModelConfig


@dataclass(frozen=True)
class Narrowing:
    """What stays of one block, counted from 0 among what it has now; None keeps all."""

    heads: tuple[int, ...] | None = None
    """Attention heads, sorted."""
    channels: tuple[int, ...] | None = None
    """MLP channels, sorted."""

    def __post_init__(self) -> None:
        for field in ("heads", "channels"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(int(i) for i in getattr(self, field)))


@dataclass(frozen=True)
class Selection:
    """Rows or columns of one parameter that stay."""

    shape: tuple[int, ...]
    """Of the parameter before."""
    axis: int
    """0 selects rows, 1 columns."""
    kept: tuple[int, ...]
    """Sorted indices along the axis."""

    def before(self, position: int) -> int:
        """Elements that stay in front of a flattened position."""
        columns = self.shape[1] if len(self.shape) == 2 else 1
        row, column = divmod(position, columns)
        if self.axis == 1:
            return row * len(self.kept) + bisect_left(self.kept, column)
        above = bisect_left(self.kept, row)
        return above * columns + (column if self.kept[above : above + 1] == (row,) else 0)

    def mask(self, start: int, stop: int) -> Tensor:
        """(stop - start,) bool: which of these flattened elements stay."""
        columns = self.shape[1] if len(self.shape) == 2 else 1
        first, last = start // columns, -(-stop // columns)
        stays = torch.zeros(self.shape[self.axis], dtype=torch.bool)
        stays[list(self.kept)] = True
        rows = stays[first:last, None].expand(-1, columns) if self.axis == 0 else stays.expand(last - first, -1)
        return rows.reshape(-1)[start - first * columns : stop - first * columns]


def narrowed(model: ModelConfig, kept_blocks: tuple[int, ...], narrow: Mapping[int, Narrowing]) -> ModelConfig:
    """The architecture that keeps these blocks and narrows some of them.

    Raises:
        ValueError: listing every block that is not kept and every index that the block does not have.
    """
    problems = [p for block in sorted(narrow) for p in _problems(model, kept_blocks, block, narrow[block])]
    if problems:
        raise ValueError(" ".join(problems))
    widths = {block: model.widths(block) for block in kept_blocks}
    for block, stays in narrow.items():
        widths[block] = _counts(stays, *widths[block])
    full = (model.num_heads, model.mlp_size)
    narrower = tuple((block, *widths[block]) for block in sorted(widths) if widths[block] != full)
    return replace(model, kept_blocks=kept_blocks, block_widths=narrower)


def _counts(stays: Narrowing, heads: int, channels: int) -> tuple[int, int]:
    return (
        heads if stays.heads is None else len(stays.heads),
        channels if stays.channels is None else len(stays.channels),
    )


def _problems(model: ModelConfig, kept_blocks: tuple[int, ...], block: int, stays: Narrowing) -> list[str]:
    if block not in kept_blocks:
        return [f"block {block} cannot be narrowed: it is not among the blocks that stay, {list(kept_blocks)}."]
    found = []
    for what, have, kept in zip(("heads", "channels"), model.widths(block), (stays.heads, stays.channels), strict=True):
        if kept is not None and (not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= have):
            message = f"the {what} that stay in block {block} must be sorted indices below {have}, at least one, "
            found.append(message + f"each once, got {list(kept)}.")
    return found


def selections(model: ModelConfig, narrow: Mapping[int, Narrowing]) -> dict[str, Selection]:
    """{parameter name: what stays of it} for every parameter that gets smaller.

    Args:
        model: the architecture before.
        narrow: checked by `narrowed`.
    """
    found = {}
    for block, stays in narrow.items():
        for name, selection in _of_block(model, block, stays).items():
            found[f"blocks.{block}.{name}"] = selection
    return found


def _of_block(model: ModelConfig, block: int, stays: Narrowing) -> dict[str, Selection]:
    width, size, (heads, channels) = model.hidden_size, model.head_size, model.widths(block)
    found, inner = {}, heads * size
    if stays.heads is not None:
        kept = tuple(head * size + i for head in stays.heads for i in range(size))
        of_qkv = tuple(part * inner + i for part in range(3) for i in kept)  # rows of q, then of k, then of v
        found["attn.qkv.weight"] = Selection((3 * inner, width), 0, of_qkv)
        found["attn.qkv.bias"] = Selection((3 * inner,), 0, of_qkv)
        found["attn.proj.weight"] = Selection((width, inner), 1, kept)
    if stays.channels is not None:
        found["mlp.fc1.weight"] = Selection((channels, width), 0, stays.channels)
        found["mlp.fc1.bias"] = Selection((channels,), 0, stays.channels)
        found["mlp.fc2.weight"] = Selection((width, channels), 1, stays.channels)
    return found
