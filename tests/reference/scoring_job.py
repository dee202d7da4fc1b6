"""Everything that a check scores, on any number of ranks: each rank takes its part of the same fixed draws."""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.ntk import ntk_score
from entprune_ds.importance.scores import score_blocks, scores_as_json
from entprune_ds.importance.sweep import leave_one_out
from entprune_ds.importance.sweep_statistics import SweepStatistics
from entprune_ds.importance.zico import zico_score
from tests.reference.toys import CountingParts, draws, mean_squared, random_dit

GROUPS, GROUP_SIZE, REPEATS, BATCHES = 4, 10, 3, 5


def projection(repeat: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(repeat))


def sweep_statistics(parts: CountingParts, kept: list[int], spoil_rank: int = -1) -> SweepStatistics:
    """Statistics of this rank's draws; on `spoil_rank` one number of batch 2 is infinite."""
    model = random_dit()
    statistics = SweepStatistics(kept, GROUPS, (1, 4, 4), torch.device("cpu"))
    for group in range(GROUPS):
        mine = slice(comm.rank(), None, comm.world_size())
        z_t, t, labels, target = (x[mine] for x in draws(model, GROUP_SIZE, seed=1, step=group))
        outputs = leave_one_out(parts, kept, z_t, t, labels, chunk=7)
        if group == 2 and comm.rank() == spoil_rank:
            outputs[3, 0] = torch.inf
        statistics.update(group, outputs, target, t, mean_squared)
    return statistics


def score_everything() -> dict:
    """Plain values of all scores, the requests for blocks, and the error that one rank's bad number causes."""
    model = random_dit()
    kept, parts = [int(b) for b in model.blocks], CountingParts(model)
    scores = score_blocks(sweep_statistics(parts, kept).reduce(), kept)
    ntk = ntk_score(parts, kept[:3], lambda r: draws(model, 6, seed=2, step=r)[:3], projection, REPEATS)
    zico = zico_score(parts, kept[:3], lambda b: draws(model, 4, seed=3, step=b), mean_squared, BATCHES)
    requests = list(parts.requests)
    try:
        sweep_statistics(parts, kept, spoil_rank=comm.world_size() - 1).reduce()
        problem = ""
    except comm.DistributedError as error:
        problem = str(error)
    return {
        "scores": scores_as_json(scores),
        "ntk": [ntk.median, *ntk.repeats],
        "zico": [zico.mean, zico.total, zico.skipped],
        "requests": requests,
        "problem": problem,
    }
