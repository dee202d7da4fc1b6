"""How scoring sees a model, sharded or not: a stem, blocks handed out one at a time, a head."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn


class Parts(Protocol):
    """What the sweep and the backward walk need of a model."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the scoring passes."""

    @property
    def device(self) -> torch.device:
        """Device of this rank's parts."""

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """z_t (N,C,H,W), t (N,), labels (N,) i64 -> tokens x (N,T,D), conditioning c (N,D)."""

    def block(self, index: int) -> nn.Module:
        """Block of ORIGINAL index `index`, called as block(x, c) -> x; frozen, in evaluation mode.

        Valid only until the next call. Collective where the model is sharded: all ranks make the same calls
        in the same order.
        """

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> prediction (N,C,H,W), without a learned-variance half."""


class ModuleParts:
    """Parts of an unsharded model with members blocks (ModuleDict keyed by str(index)), in_channels, embed and head.

    Works on copies, the stem and head taken here and one block at a time in `block`, so that mode, gradients,
    hooks and precision of the model stay as they are. Make a new one after every change of the weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        """
        Args:
            model: the model; every parameter on one device.
            dtype: precision of the copies; None keeps the model's.
        """
        first = next(model.parameters())
        self.dtype, self.device = dtype or first.dtype, first.device
        self._blocks: nn.ModuleDict = model.blocks  # type: ignore[assignment]
        no_blocks: dict[int, object] = {
            id(self._blocks): nn.ModuleDict()
        }  # the copy of the model gets these instead of its blocks
        self._stem = self._scoring_copy(model, no_blocks)

    def _scoring_copy(self, module: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
        return copy.deepcopy(module, memo).to(self.dtype).eval().requires_grad_(False)

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See Parts."""
        return self._stem.embed(z_t, t, labels)  # type: ignore[operator]

    def block(self, index: int) -> nn.Module:
        """See Parts.

        Raises:
            ValueError: when the model has no such block, listing those that it has.
        """
        if str(index) not in self._blocks:
            raise ValueError(f"block {index} is not in the model, which has {', '.join(self._blocks)}.")
        return self._scoring_copy(self._blocks[str(index)])

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """See Parts."""
        return self._stem.head(x, c)[:, : self._stem.in_channels]  # type: ignore[operator]


def embed(parts: Parts, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`parts.embed` of a draw in any floating dtype on any device; t keeps its precision for the sinusoids."""
    device = parts.device
    return parts.embed(z_t.to(device, parts.dtype), t.to(device), labels.to(device))
