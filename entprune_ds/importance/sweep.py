"""One sweep: the outputs of the full model and of every model that lacks one unit, from a single pass.

Variants ride as one stack. Before block j it holds the clean stream and the j variants that dropped one of the
earlier blocks; block j is applied to all of them, and the clean stream as it was BEFORE block j joins as the variant
that drops it. Exact; L(L+1)/2 block evaluations instead of L + L(L-1), the minimum with shared prefixes; every block
is obtained once. A variant that lacks one branch of block j (its attention, its MLP) joins at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from entprune_ds.importance.parts import Parts, embed

UNITS = ("block", "attention", "mlp")
"""What a variant lacks: a whole block, or one of its branches (then called as block(x, c, without=branch))."""


class Swept(NamedTuple):
    """What a sweep of L blocks and U units finds on N draws. Unit u of the i-th block has row i * U + u."""

    outputs: Tensor
    """(1+L*U,N,C,H,W) in the dtype of parts: the full model, then the variants."""
    changes: Tensor
    """(L*U,2,N) float64: how far the clean stream right after a block is from the same stream without the unit, as
    mean squared difference and as 1 - cosine, mean over tokens; for a whole block, from its own input."""

    def of_unit(self, place: int, num_units: int) -> Swept:
        """The full model and the variants that lack one unit of several."""
        if num_units == 1:
            return self
        rows = [0, *range(1 + place, len(self.outputs), num_units)]
        return Swept(self.outputs[rows], self.changes[place::num_units])


class Streams(Protocol):
    """Where a sweep may leave streams, for a later sweep of the same draws with fewer blocks."""

    def take(self, kept_blocks: Sequence[int]) -> tuple[int, Tensor, Tensor] | None:
        """Number of leading blocks passed, stack (V,N,T,D) and changes (V-1,2,N) there; None without any."""

    def offer(self, passed: Sequence[int], stack: Tensor, changes: Tensor) -> None:
        """Streams before the next block, which may be copied: they change afterwards."""


@torch.no_grad()
def grow(
    stack: Tensor, filled: int, conditioning: Tensor, block: nn.Module, units: Sequence[str], chunk: int | None
) -> Tensor:
    """Take the first `filled` rows of a stack through one block, in place, and add the variants that lack a unit.

    Args:
        stack: (V,N,T,D); stack[0] is the clean stream; rows from `filled` on are free.
        conditioning: (N,D), shared by the variants.
        block: called as block(x (n,T,D), c (n,D)).
        units: of UNITS; unit u goes to row filled + u.
        chunk: most samples per call, counted over rows * N; None means one call.

    Returns:
        changes (U,2,N), see Swept.
    """
    for row, unit in enumerate(units, filled):
        stack[row] = stack[0]
        if unit != "block":
            _apply(block, stack[row], conditioning, chunk, without=unit)
    before = stack[:filled].flatten(0, 1)  # (filled*N,T,D), a view
    _apply(block, before, conditioning.repeat(filled, 1), chunk)
    return torch.stack([stream_change(stack[0], stack[filled + u], chunk) for u in range(len(units))])


def _apply(block: nn.Module, x: Tensor, c: Tensor, chunk: int | None, **branch: str) -> None:
    """Replace x (M,T,D) by block(x, c), at most `chunk` rows a call."""
    step = chunk or max(1, len(x))  # a rank may have no draws
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        x[part] = block(x[part], c[part], **branch)


def stream_change(a: Tensor, b: Tensor, chunk: int | None = None) -> Tensor:
    """Mean squared difference, and mean over tokens of 1 - cosine, of streams (N,T,D) -> (2,N) float64.

    1 - cos = |a/|a| - b/|b||^2 / 2, which is exactly 0 for equal tokens.
    """
    found, step = a.new_zeros(2, len(a), dtype=torch.float64), chunk or max(1, len(a))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        x, y = a[part].double(), b[part].double()
        found[0, part] = (x - y).square().mean((1, 2))
        x, y = (v / v.norm(dim=2, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (x, y))
        found[1, part] = (x - y).square().sum(2).mean(1) / 2
    return found


@torch.no_grad()
def sweep(
    parts: Parts, kept_blocks: Sequence[int], z_t: Tensor, t: Tensor, labels: Tensor,
    units: Sequence[str] = ("block",), chunk: int | None = None, streams: Streams | None = None,
) -> Swept:  # fmt: skip
    """Outputs of the full model and of every model that lacks one unit, on the same draws.

    Collective where `parts` is sharded: all ranks call it, with the same blocks and `streams` that agree.

    Args:
        parts: the model.
        kept_blocks: original indices of the present blocks, sorted.
        z_t: (N,C,H,W); t: (N,); labels: (N,) i64.
        units: of UNITS.
        chunk: most samples per block call; bounds the memory of activations. The stack itself takes
            (1+L*U)*N*T*D numbers, see stack_memory.py.
        streams: takes over streams of an earlier sweep of these draws, and keeps some of this one.
    """
    x, c = embed(parts, z_t, t, labels)  # (N,T,D), (N,D)
    rows = 1 + len(kept_blocks) * len(units)
    stack, changes = x.new_empty(rows, *x.shape), x.new_empty(rows - 1, 2, len(x), dtype=torch.float64)
    stack[0], passed = x, 0
    if streams is not None and (found := streams.take(kept_blocks)) is not None:
        passed = found[0]
        filled = 1 + passed * len(units)
        stack[:filled], changes[: filled - 1] = found[1:]
    for index in kept_blocks[passed:]:
        filled = 1 + passed * len(units)
        if streams is not None:
            streams.offer(kept_blocks[:passed], stack[:filled], changes[: filled - 1])
        changes[filled - 1 : filled - 1 + len(units)] = grow(stack, filled, c, parts.block(index), units, chunk)
        passed += 1
    step = chunk or max(1, rows * len(x))
    flat, conditioning = stack.flatten(0, 1).split(step), c.repeat(rows, 1).split(step)
    heads = [parts.head(a, b) for a, b in zip(flat, conditioning, strict=True)]
    return Swept(torch.cat(heads).unflatten(0, (rows, len(x))), changes)


def leave_one_out(
    parts: Parts, kept_blocks: Sequence[int], z_t: Tensor, t: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """The outputs of `sweep` for whole blocks, (1+L,N,C,H,W)."""
    return sweep(parts, kept_blocks, z_t, t, labels, chunk=chunk).outputs
