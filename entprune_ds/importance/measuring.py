"""What a criterion may look at while it measures: the model one block at a time, and draws of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.stack_memory import KeptStreams
from entprune_ds.importance.sweep_statistics import LossFn


class Batch(NamedTuple):
    """Draws at the border of the model."""

    z_t: Tensor
    """(N,C,H,W)."""
    t: Tensor
    """(N,)."""
    labels: Tensor
    """(N,) i64."""
    target: Tensor
    """Of the objective, batch first."""


class Draw(Protocol):
    """Hands out draws of the data."""

    def __call__(self, purpose: str, count: int, t: Tensor | None = None) -> Batch:
        """The next `count` draws of a purpose, equal on all ranks.

        Args:
            purpose: names the random streams.
            count: the same at every call of a purpose.
            t: (count,) in [0, 1), see Objective.make_draws; None draws t as training does.
        """


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """A check as a criterion's measure sees it. Nothing in it leads to the training state."""

    parts: Parts
    """The model: `embed`, one `block(i)` after another, `head`. Where it is sharded, all ranks make the same calls."""
    kept_blocks: tuple[int, ...]
    """Present blocks, sorted original indices."""
    config: Config
    check: int
    """Number of this check, from 0; names the random streams together with the seed of the run."""
    draw: Draw
    """draw(purpose, count) -> the next draws of that purpose, equal on all ranks."""
    loss_fn: LossFn
    """(prediction (N,C,H,W), target, t) -> loss per example (N,)."""
    streams: KeptStreams | None = None
    """Of the same draws in an earlier round of a greedy ranking, which a sweep may start from."""
    removable: int = 1
    """Most blocks that this check may remove."""


def my_share(batch: Batch) -> Batch:
    """This rank's part of a batch that all ranks have drawn alike; may be empty."""
    return Batch(*(torch.tensor_split(column, comm.world_size())[comm.rank()] for column in batch))
