"""Which block is to blame when a loss or a gradient is not finite: a forward pass that is made only then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import embed


@torch.no_grad()
def raise_not_finite(m: Measuring, mine: Batch, where: Callable[[int], str]) -> None:
    """Raise an error that names the first block whose output is NaN or infinite, and the batch. Collective.

    All ranks call it when the reduced loss or gradient is not finite; each looks at its own draws.

    Args:
        m: the check.
        mine: this rank's draws.
        where: draw (its place in `mine`) -> the batch that it belongs to, for the error.

    Raises:
        DistributedError: on all ranks.
    """
    x, c = embed(m.parts, mine.z_t, mine.t, mine.labels)
    problem = _problem(m, "the embedding of z_t, t and labels", x, where)
    for index in m.kept_blocks:
        x = m.parts.block(index)(x, c)
        problem = problem or _problem(m, f"the output of block {index}", x, where)
    problem = problem or _problem(m, "the output of the head", m.parts.head(x, c), where)
    comm.raise_together(problem)
    text = f"check {m.check}: the loss of the full model is NaN or infinite although all outputs are finite."
    raise comm.DistributedError(text + " Nothing was removed.")


def _problem(m: Measuring, what: str, x: Tensor, where: Callable[[int], str]) -> str | None:
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
    return f"check {m.check}: {what} is NaN or infinite in {where(bad[0])}. Nothing was removed." if bad else None
