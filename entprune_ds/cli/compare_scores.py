"""Scores of whole keep-sets, on the draws of a first check: sums of single blocks, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from entprune_ds.calibration import examples_of
from entprune_ds.config import Config
from entprune_ds.coordinator import measuring
from entprune_ds.importance.evenness import keep_set_value
from entprune_ds.importance.gradient_flow import measure_gradient_flow
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.magnitude import measure_magnitude
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.parts import ModuleParts, embed
from entprune_ds.importance.scores import Scores, score_blocks
from entprune_ds.importance.sweep_statistics import SweepStatistics
from entprune_ds.importance.taylor import measure_diff_pruning, measure_taylor
from entprune_ds.models.dit import DiT

SINGLE_ONLY: tuple[Callable[[Measuring], Scores], ...] = (
    measure_magnitude, measure_taylor, measure_diff_pruning, measure_gradient_flow
)  # fmt: skip
"""Scores of single blocks besides those of a sweep."""


def score_sets(config: Config, net: DiT, keep_sets: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """{set: {"sum of single NAME", "NAME of the whole set", ...}} for every score NAME of a sweep.

    The sums go over the blocks that leave; of SINGLE_ONLY there are sums alone. "NAME, spread" is what the keep-set is
    worth by the scores of its blocks against even spacing (importance/evenness.py), "unevenness" what it is worth by
    its spacing alone, both with their signs turned, as is that of gradient_flow: low ones are good. Only signed_ced has
    no good end, and so no spread.
    """
    kept = config.model.blocks
    singles = measure_sweep(_measuring(config, net))
    for measure in SINGLE_ONLY:
        singles |= measure(_measuring(config, net))
    singles["gradient_flow"] = {b: replace(s, value=-s.value) for b, s in singles["gradient_flow"].items()}
    whole = measure_sets(_measuring(config, net), list(keep_sets.values()))
    found: dict[str, dict[str, float]] = {}
    for number, (name, keep) in enumerate(keep_sets.items()):
        gone = [block for block in kept if block not in keep]
        found[name] = {f"sum of single {n}": sum(s[b].value for b in gone) for n, s in singles.items()}
        found[name] |= {f"{n} of the whole set": s[number].value for n, s in whole.items()}
        for n, s in singles.items():
            if n != "signed_ced":
                found[name][f"{n}, spread"] = -keep_set_value(sorted(keep), {b: s[b].value for b in kept})
        found[name]["unevenness"] = -keep_set_value(sorted(keep), dict.fromkeys(kept, 0.0))
    return found


def _measuring(config: Config, net: DiT) -> Measuring:
    """The first check of the first seed, as a criterion sees it."""
    return measuring(ModuleParts(net), config.model.blocks, config, 0, examples_of(config, 0))


@torch.no_grad()
def measure_sets(m: Measuring, keep_sets: list[list[int]]) -> Scores:
    """The leave-one-out scores with keep-sets in the place of single blocks: {score: {number of the set: Score}}."""
    size, groups = m.config.score.batch_size, m.config.score.draws // m.config.score.batch_size
    statistics: SweepStatistics | None = None
    numbers = tuple(range(len(keep_sets)))
    for group in range(groups):
        batch = m.draw("calibration", size)
        x, c = embed(m.parts, batch.z_t, batch.t, batch.labels)  # (N,T,D), (N,D)
        outputs = []
        for keep in [list(m.kept_blocks), *keep_sets]:
            stream = x
            for block in keep:
                stream = m.parts.block(block)(stream, c)
            outputs.append(m.parts.head(stream, c))
        stack = torch.stack(outputs)  # (1+S,N,C,H,W)
        if statistics is None:
            statistics = SweepStatistics(numbers, groups, tuple(stack.shape[2:]), stack.device)
        statistics.update(group, stack, batch.target, batch.t, m.loss_fn)
    assert statistics is not None  # groups >= 2 is checked with the config
    return score_blocks(statistics.reduce(), numbers)
