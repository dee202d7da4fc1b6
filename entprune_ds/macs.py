"""Multiply-accumulates of a block: what its heads, its MLP channels and the rest of it cost. Integers, no torch.

Element-wise work is not counted, as in the Gflops column of the DiT paper (arXiv 2212.09748, table 4), which counts
multiply-accumulates.
"""

from __future__ import annotations

from dataclasses import dataclass

from entprune_ds.config_schema import ModelConfig


@dataclass(frozen=True)
class BlockMacs:
    """Multiply-accumulates of one forward pass of one example."""

    head: int
    """Of one attention head: its part of qkv and of the projection, scores and weighted values."""
    channel: int
    """Of one MLP channel."""
    rest: int
    """Of the adaLN layer, once per example; it goes with the block alone."""

    def total(self, heads: float, channels: float) -> float:
        """Of a block with these widths."""
        return self.rest + heads * self.head + channels * self.channel


def unit_macs(model: ModelConfig) -> BlockMacs:
    """What the units of a block cost, the same in every block of an architecture."""
    tokens, width, size = (model.input_size // model.patch_size) ** 2, model.hidden_size, model.head_size
    return BlockMacs(
        head=4 * tokens * width * size + 2 * tokens * tokens * size,
        channel=2 * tokens * width,
        rest=6 * width * width,
    )


def blocks_macs(model: ModelConfig) -> int:
    """Of all present blocks, each as wide as it is."""
    units = unit_macs(model)
    return int(sum(units.total(*model.widths(block)) for block in model.blocks))
