"""Backward through the model one block at a time, yielding what every linear layer saw.

The input a and output gradient g of a linear layer hold all its per-sample weight gradients, so the NTK and
ZiCo need no parameter gradient at all: parameters stay frozen, no parameter hook fires, `.grad` is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entprune_ds.importance.parts import Parts, embed


class LinearRecord(NamedTuple):
    """One linear layer in one walk; T is 1 where the layer sees the conditioning (adaLN)."""

    activation: Tensor
    """Input (N,T,d_in)."""
    gradient: Tensor
    """Gradient with respect to the output (N,T,d_out)."""
    module: nn.Linear
    """The layer; its weights are valid only until the next block is asked for."""


def backward_walk(
    parts: Parts,
    kept_blocks: Sequence[int],
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    output_gradient: Callable[[Tensor], Tensor],
) -> Iterator[tuple[int, dict[str, LinearRecord]]]:
    """Yield (block index, {layer name: LinearRecord}) of all nn.Linear of a block, from the last block to the first.

    A forward pass keeps the block inputs; then each block is recomputed with its input AND the conditioning
    requiring gradients (without the latter the adaLN layers, a third of the weights, would not be seen).
    2 L calls of parts.block; collective where `parts` is sharded.

    Args:
        parts: the model.
        kept_blocks: original indices of the present blocks, sorted.
        z_t: (N,C,H,W); t: (N,); labels: (N,) i64.
        output_gradient: prediction (N,C,H,W) -> gradient with respect to it, same shape.
    """
    with torch.no_grad():
        x, c = embed(parts, z_t, t, labels)  # (N,T,D), (N,D)
        inputs = []
        for index in kept_blocks:
            inputs.append(x)
            x = parts.block(index)(x, c)
    gradient = _head_gradient(parts, x, c, output_gradient)
    for index in reversed(kept_blocks):
        records, gradient = _block_gradients(parts.block(index), index, inputs.pop(), c, gradient)
        yield index, records


def _head_gradient(parts: Parts, x: Tensor, c: Tensor, output_gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient with respect to the output of the last block, (N,T,D)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction = parts.head(x, c)
        require_graph(prediction, "the head")
        return torch.autograd.grad(prediction, x, output_gradient(prediction.detach()))[0]


def _block_gradients(
    block: nn.Module, index: int, x: Tensor, c: Tensor, gradient: Tensor
) -> tuple[dict[str, LinearRecord], Tensor]:
    """Records of a block's linear layers, and the gradient (N,T,D) with respect to its input."""
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in seen:
                raise ValueError(f"layer {name} of block {index} is called twice; its gradients cannot be told apart.")
            seen[name] = (args[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in layers.items()]
    try:
        with torch.enable_grad():
            x, c = x.detach().requires_grad_(), c.detach().requires_grad_()
            y = block(x, c)
            require_graph(y, f"block {index}")
    finally:
        for handle in handles:
            handle.remove()
    unused = sorted(set(layers) - set(seen))
    if unused:
        raise ValueError(f"layers {unused} of block {index} are not used in its forward pass.")
    outputs = [output for _, output in seen.values()]
    input_gradient, *gradients = torch.autograd.grad(y, [x, *outputs], gradient)
    records = {
        name: LinearRecord(_with_tokens(activation), _with_tokens(g), layers[name])
        for (name, (activation, _)), g in zip(seen.items(), gradients, strict=True)
    }
    return records, input_gradient


def require_graph(output: Tensor, of: str) -> None:
    """Refuse an output that no gradient can flow back from.

    Args:
        output: of a module that was called with inputs that require gradients.
        of: what made it, for the error.

    Raises:
        ValueError: when it has no graph.
    """
    if not output.requires_grad:
        message = (
            f"the output of {of} carries no gradient, which this score needs: it is detached, or scoring runs under "
        )
        message += "torch.inference_mode. Leave that mode, or choose a criterion without gradients, such as loss. "
        raise ValueError(message + "Nothing was removed.")


def _with_tokens(tensor: Tensor) -> Tensor:
    """(N,d) -> (N,1,d); (N,T,d) as it is."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
