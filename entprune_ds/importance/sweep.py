"""One sweep: the outputs of the full model and of every model that lacks one block, from a single pass.

Variants ride as one growing stack. Before block j the stack holds the clean stream and the j variants
that dropped one of the earlier blocks; block j is applied to all of them, and the clean stream as it was
BEFORE block j joins as the variant that drops it. Exact; L(L+1)/2 block evaluations instead of L + L(L-1),
the minimum with shared prefixes; every block is obtained once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entprune_ds.importance.parts import Parts, embed


@torch.no_grad()
def grow(stack: Tensor, conditioning: Tensor, block: nn.Module, chunk: int | None = None) -> Tensor:
    """Take every variant through one block and add the variant that drops it.

    Args:
        stack: (V,N,T,D); stack[0] is the clean stream.
        conditioning: (N,D), shared by the variants.
        block: called as block(x (n,T,D), c (n,D)).
        chunk: most samples per call, counted over V * N; None means one call.

    Returns:
        (V+1,N,T,D): the V variants after the block, then the clean stream before it.
    """
    variants, draws, tokens, width = stack.shape
    grown = stack.new_empty(variants + 1, draws, tokens, width)
    before, after = stack.flatten(0, 1), grown[:variants].view(-1, tokens, width)  # (V*N,T,D)
    c = conditioning.repeat(variants, 1)  # (V*N,D)
    step = chunk or max(1, len(before))  # a rank may have no draws
    for start in range(0, len(before), step):
        part = slice(start, start + step)
        after[part] = block(before[part], c[part])
    grown[variants] = stack[0]
    return grown


@torch.no_grad()
def leave_one_out(
    parts: Parts, kept_blocks: Sequence[int], z_t: Tensor, t: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """Outputs of the full model and of every model that lacks one block, on the same draws.

    Collective where `parts` is sharded: all ranks call it, with the same blocks.

    Args:
        parts: the model.
        kept_blocks: original indices of the present blocks, sorted.
        z_t: (N,C,H,W); t: (N,); labels: (N,) i64.
        chunk: most samples per block call; bounds the memory of activations.

    Returns:
        (1+L,N,C,H,W) in the dtype of parts; index 0 is the full model, 1 + i lacks kept_blocks[i].
    """
    x, c = embed(parts, z_t, t, labels)  # (N,T,D), (N,D)
    stack = x.unsqueeze(0)  # (1,N,T,D)
    for index in kept_blocks:
        stack = grow(stack, c, parts.block(index), chunk)
    variants, draws = stack.shape[:2]
    step = chunk or max(1, variants * draws)
    flat, conditioning = stack.flatten(0, 1), c.repeat(variants, 1)
    heads = [parts.head(a, b) for a, b in zip(flat.split(step), conditioning.split(step), strict=True)]
    return torch.cat(heads).unflatten(0, (variants, draws))
