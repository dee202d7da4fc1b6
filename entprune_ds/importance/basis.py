"""Few directions of the output that all variants share: fitted on the full model and whitened by it.

The basis is fitted on draws of its own, so that the scored draws are as new to the full model as to every other one.
All ranks together compute the same outputs whatever their number, and take the basis of rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.entropy_draws import LEAST_SPREAD, gather_rows
from entprune_ds.importance.measuring import Batch, Measuring, my_share
from entprune_ds.importance.parts import embed
from entprune_ds.rng import generator_for

DRAWS_PER_DIRECTION = 8
"""Draws that the basis is fitted on, per direction, at least."""


def fit_basis(m: Measuring, directions: int, chunk: int) -> Tensor:
    """A basis (C*H*W,d) float64 in which outputs of the full model have unit covariance. Collective: all ranks call.

    Columns are NaN where the full model's outputs have no spread, so that whatever is projected on them has none.

    Args:
        directions: d; score.basis says whether those of largest variance (pca) or random ones.
        chunk: most samples per block call.

    Raises:
        DistributedError: on all ranks, when an output is not finite, naming the block.
    """
    count = max(m.config.score.batch_size, DRAWS_PER_DIRECTION * directions)
    mine = my_share(m.draw("entropy_basis", count))
    outputs = gather_rows(_full_outputs(m, mine, chunk).double().flatten(1))
    centred = outputs - outputs.mean(0)
    if m.config.score.basis == "random":
        generator = generator_for(m.config.run.seed, "entropy/basis")
        normal = torch.randn(outputs.shape[1], directions, generator=generator, dtype=torch.float64)
        chosen = torch.linalg.qr(normal).Q.to(outputs.device)
    else:
        chosen = torch.linalg.svd(centred, full_matrices=False).Vh[:directions].T
    basis = whitened(chosen, centred)
    return comm.all_reduce_sum(basis if comm.is_main() else torch.zeros_like(basis))


def whitened(directions: Tensor, centred: Tensor) -> Tensor:
    """Directions (D,d) turned and scaled within their span, so that draws (n,D) of mean 0 get unit covariance."""
    projected = centred @ directions
    values, vectors = torch.linalg.eigh(projected.mT @ projected / len(projected))
    usable = values > LEAST_SPREAD * values.max()
    return directions @ (vectors * torch.where(usable, values, torch.nan).rsqrt())


@torch.no_grad()
def _full_outputs(m: Measuring, mine: Batch, chunk: int) -> Tensor:
    """Outputs (N,C,H,W) of the full model on this rank's draws. Collective: all ranks call."""
    x, c = embed(m.parts, mine.z_t, mine.t, mine.labels)
    problem = None
    for index in m.kept_blocks:
        block = m.parts.block(index)
        x = torch.cat([block(*part) for part in zip(x.split(chunk), c.split(chunk), strict=True)])
        if problem is None and not torch.isfinite(x).all():
            problem = f"check {m.check}: the output of block {index} is NaN or infinite. Nothing was removed."
    comm.raise_together(problem)
    return torch.cat([m.parts.head(*part) for part in zip(x.split(chunk), c.split(chunk), strict=True)])
