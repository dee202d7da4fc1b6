"""Worker function of test_proxies.py: which rank computes what, with more ranks than batches."""

from __future__ import annotations

import torch

from entprune_ds import comm
from entprune_ds.importance.ntk import ntk_score
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.zico import zico_score
from tests.reference.scoring_job import projection
from tests.reference.toys import draws, mean_squared, random_dit


def shares() -> dict:
    """Proxies of 3 ranks: ZiCo over 5 batches and over 2, NTK over 4 repeats; what each rank drew; errors."""
    model = random_dit(depth=3)
    parts, kept, drawn = ModuleParts(model), [0, 1, 2], {"zico": [], "few": [], "ntk": []}

    def zico_draw(name: str):
        return lambda batch: (drawn[name].append(batch), draws(model, 4, step=batch))[1]

    def ntk_draw(repeat: int):
        drawn["ntk"].append(repeat)
        return draws(model, 5, seed=2, step=repeat)[:3]

    def broken(batch: int):
        z_t, t, labels, target = draws(model, 4, step=batch)
        return (z_t, t, labels, torch.full_like(target, torch.inf) if batch == 1 else target)

    found = {
        "zico": zico_score(parts, kept, zico_draw("zico"), mean_squared, 5).total,
        "few": zico_score(parts, kept, zico_draw("few"), mean_squared, 2).total,
        "ntk": ntk_score(parts, kept, ntk_draw, projection, 4).repeats,
        "drawn": drawn,
        "problems": [],
    }
    with torch.no_grad():
        model.blocks["1"].mlp.fc1.weight[0, 0] = torch.nan
    for score in (
        lambda: zico_score(ModuleParts(random_dit(depth=3)), kept, broken, mean_squared, 3),
        lambda: ntk_score(ModuleParts(model), kept, ntk_draw, projection, 2),
    ):
        try:
            score()
        except comm.DistributedError as problem:
            found["problems"].append(str(problem))
    return found
