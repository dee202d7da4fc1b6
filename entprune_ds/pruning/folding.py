"""Gates on the outputs of units, and how they vanish into the projection that follows: W, b <- m W, m b."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Gates = Mapping[int, Mapping[str, Tensor]]
"""{original block index: {gate: values}} with the gates `gate` () on both branches of the block, `attn.gate` (heads,)
and `mlp.gate` (channels,); what is not named is 1."""


def column_factors(name: str, gates: Gates, head_size: int) -> Tensor | None:
    """What the gates multiply a parameter with: one factor () for all of it or one per column (d_in,); None: nothing.

    The bias of a projection comes after heads and channels, so that these leave it alone.

    Args:
        name: parameter name, e.g. "blocks.3.attn.proj.weight".
        gates: present gates.
        head_size: columns of the attention projection that belong to one head.
    """
    top, _, rest = name.partition(".")
    block, _, inner = rest.partition(".")
    of_block = gates.get(int(block), {}) if top == "blocks" else {}
    layer, _, kind = inner.rpartition(".")
    if layer not in ("attn.proj", "mlp.fc2") or not of_block:
        return None
    factor = of_block.get("gate", torch.ones(()))
    units = of_block.get("attn.gate" if layer == "attn.proj" else "mlp.gate")
    if units is None or kind == "bias":
        return factor
    return factor * (units.repeat_interleave(head_size) if layer == "attn.proj" else units)


def elements(factors: Tensor, start: int, stop: int) -> Tensor:
    """The factors of the elements start..stop of a flattened parameter, () or (stop - start,)."""
    if factors.dim() == 0:
        return factors
    columns = len(factors)
    first = start % columns
    rows = -(-(first + stop - start) // columns)
    return factors.repeat(rows)[first : first + stop - start]
