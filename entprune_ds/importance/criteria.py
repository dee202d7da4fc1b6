"""Which block goes first: one table of criteria, and the order of removal that each gives.

A criterion is a function of a RankingRequest that returns the present blocks, first to go first, and one line
in CRITERIA. Wherever two blocks tie, the higher index goes first.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from entprune_ds.importance.evenness import even_keep_set
from entprune_ds.importance.gradient_flow import measure_gradient_flow
from entprune_ds.importance.learned import measure_learned
from entprune_ds.importance.magnitude import measure_magnitude
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Scores
from entprune_ds.importance.taylor import measure_diff_pruning, measure_taylor
from entprune_ds.rng import generator_for


@dataclass(frozen=True, kw_only=True)
class RankingRequest:
    """Everything that a criterion may look at."""

    scores: Scores
    """Scores of the last sweep; may be empty for a criterion that does not need it."""
    kept_blocks: tuple[int, ...]
    """Present blocks, sorted."""
    target_depth: int
    """Blocks that remain at the end of the run."""
    seed: int
    """Seed of the run."""
    check: int
    """Number of this check, from 0."""
    explicit_order: tuple[int, ...]
    """The user's order, for criterion explicit."""
    combined: Mapping[str, float] = field(default_factory=dict)
    """Weights of its members by name, for criterion combined."""
    protected: tuple[int, ...] = ()
    """Blocks that never go, whatever the order says; a criterion that chooses whole keep-sets holds them."""


@dataclass(frozen=True)
class Criterion:
    """One line of the table."""

    order: Callable[[RankingRequest], list[int]]
    measure: Callable[[Measuring], Scores] | None = None
    """Measures scores of its own, under names of its own. Collective; None when the sweep or nothing is enough."""
    needs_sweep: bool = False
    """Whether the order depends on the scores of a sweep."""
    needs_entropy: bool = False
    """Whether the order depends on an entropy, which needs spread in nearly every output element."""
    races: bool = False
    """Whether a recovery race, which trains, gives it its scores."""


def removal_order(
    criterion: str | Criterion,
    scores: Scores,
    kept_blocks: Sequence[int],
    *,
    target_depth: int,
    seed: int = 0,
    check: int = 0,
    explicit_order: Sequence[int] = (),
    combined: Mapping[str, float] | None = None,
    protected: Sequence[int] = (),
) -> list[int]:
    """Present blocks in the order of removal, first to go first; a pure function of its arguments.

    Raises:
        ValueError: for an unknown criterion, one whose scores are absent or not finite, or an order that is none.
    """
    chosen = find_criterion(criterion) if isinstance(criterion, str) else criterion
    request = RankingRequest(
        scores=scores,
        kept_blocks=tuple(sorted(kept_blocks)),
        target_depth=target_depth,
        seed=seed,
        check=check,
        explicit_order=tuple(explicit_order),
        combined=combined or {},
        protected=tuple(b for b in protected if b in kept_blocks),
    )
    order = list(chosen.order(request))
    with contextlib.suppress(TypeError):  # numbers of numpy and torch become plain ones, for the record
        order = [operator.index(block) for block in order]
    if any(type(block) is not int for block in order) or sorted(order) != list(request.kept_blocks):
        message = f"check {check}: the criterion must order the present blocks {list(request.kept_blocks)}, each once, "
        raise ValueError(message + f"but gave {order}. Correct its order. Nothing was removed.")
    return order


def find_criterion(name: str) -> Criterion:
    """The line of the table.

    Raises:
        ValueError: for an unknown criterion.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion `{name}` is not known. Choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def lowest_score_first(name: str) -> Callable[[RankingRequest], list[int]]:
    """The order of a leave-one-out score: what changes the output least goes first."""

    def order(request: RankingRequest) -> list[int]:
        by_block = request.scores.get(name, {})
        values = {b: by_block[b].value for b in request.kept_blocks if b in by_block}
        bad = [b for b in request.kept_blocks if not math.isfinite(values.get(b, math.nan))]
        if bad:
            raise ValueError(f"check {request.check}: blocks {bad} have no finite `{name}` score. Nothing was removed.")
        return sorted(values, key=lambda b: (values[b], -b))

    return order


def highest_score_first(name: str) -> Callable[[RankingRequest], list[int]]:
    """The order of a score that says how much is gained when a block goes."""
    lowest_first = lowest_score_first(name)

    def order(request: RankingRequest) -> list[int]:
        lowest_first(request)  # finite scores, or its error
        return sorted(request.kept_blocks, key=lambda b: (-request.scores[name][b].value, -b))

    return order


def random_order(request: RankingRequest) -> list[int]:
    """A random order that is a function of (seed, block) alone, and so the same at every check."""

    def key(block: int) -> float:
        generator = generator_for(request.seed, "random_criterion", 0, block)
        return torch.rand(1, generator=generator, dtype=torch.float64).item()

    return sorted(request.kept_blocks, key=lambda b: (key(b), -b))


def explicit(request: RankingRequest) -> list[int]:
    """The user's blocks in the user's order, as far as they are present; then the others, highest index first."""
    listed = [b for b in request.explicit_order if b in request.kept_blocks]
    return listed + [b for b in reversed(request.kept_blocks) if b not in listed]


def by_learned_gates(request: RankingRequest) -> list[int]:
    """Blocks outside the most probable masks first, then the others; within both the least probable first."""
    mask, kept = request.scores.get("learned_mask", {}), request.scores.get("learned", {})
    missing = [b for b in request.kept_blocks if b not in mask or b not in kept]
    if missing:
        raise ValueError(f"check {request.check}: blocks {missing} have no learned gate. Nothing was removed.")
    return sorted(request.kept_blocks, key=lambda b: (mask[b].value, kept[b].value, -b))


def spread_taylor(request: RankingRequest) -> list[int]:
    """Blocks outside the even keep-set of the Diff-Pruning scores first; on both sides the lowest score first."""
    lowest_first = lowest_score_first("diff_pruning")(request)
    values = {b: request.scores["diff_pruning"][b].value for b in request.kept_blocks}
    target = max(min(request.target_depth, len(values)), len(request.protected))
    stay = even_keep_set(values, target, must_stay=request.protected)
    return sorted(lowest_first, key=stay.__contains__)


def rank_average(request: RankingRequest) -> list[int]:
    """By the weighted sum of the places that the members of a combination give each block."""
    places = {block: 0.0 for block in request.kept_blocks}
    for name, weight in request.combined.items():
        for place, block in enumerate(find_criterion(name).order(request)):
            places[block] += weight * place
    return sorted(places, key=lambda b: (places[b], -b))


def every_other(request: RankingRequest) -> list[int]:
    """Remove so that what remains is evenly spread ("oracle" of BK-SDM type; 28 -> 14 is TinyFusion's set).

    The blocks that stay are, for i = 0 .. target - 1, the present ones nearest to the even grid
    first + i * (last - first) / (target - 1), in increasing order (ties to the lower index). The grid lies on
    original indices, so the later checks of a run find the same blocks. A protected block that is not among them takes
    the place of the nearest one. The others go first, then the inner blocks that stay, then the last block and at the
    very end the first. Within each part the next to go is the one that leaves the smallest gap, then the one farthest
    from any missing block, then the higher index.
    """
    present = list(request.kept_blocks)
    stay = _evenly_spread(present, request.target_depth, request.protected)
    ends = [present[-1], present[0]] if len(present) > 1 else present
    alternates = [b for b in present if b not in stay and b not in ends]
    inner = [b for b in present if b in stay and b not in ends]
    order: list[int] = []
    displaced = [b for b in ends if request.protected and b not in stay]
    for group in (alternates, inner):
        while group:
            chosen = min(group, key=lambda b: _damage_to_spread(b, [p for p in present if p not in order]))
            order.append(chosen)
            group.remove(chosen)
        order += displaced if group is alternates else []
    return order + [b for b in ends if b not in displaced]


def _evenly_spread(present: list[int], target: int, protected: Sequence[int] = ()) -> list[int]:
    """`target` of the sorted blocks nearest to an even grid between the first and the last, protected ones included."""
    if target >= len(present):
        return present
    step = (present[-1] - present[0]) / max(target - 1, 1)
    stay, start = [], 0
    for i in range(target):
        reachable = range(start, len(present) - (target - i) + 1)  # leaves enough blocks for the rest of the grid
        position = min(reachable, key=lambda p: (abs(present[p] - (present[0] + i * step)), p))
        stay.append(present[position])
        start = position + 1
    for block in (b for b in protected if b not in stay):
        free = [b for b in stay if b not in protected]
        stay[stay.index(min(free, key=lambda b: (abs(b - block), b)))] = block
    return sorted(stay)


def _damage_to_spread(block: int, present: list[int]) -> tuple[int, int, int]:
    """Sort key of an inner block: gap that its removal leaves, then far from a missing block, then high index first."""
    position = present.index(block)
    at_end = position in (0, len(present) - 1)  # once a protected block has taken the place of the end of the model
    gap = 2 * len(present) + present[-1] if at_end else present[position + 1] - present[position - 1]
    missing = [b for b in range(present[0], present[-1]) if b not in present]
    return gap, -min((abs(block - m) for m in missing), default=0), -block


CRITERIA: dict[str, Criterion] = {
    "ced": Criterion(lowest_score_first("ced"), needs_sweep=True, needs_entropy=True),
    "ced_abs": Criterion(lowest_score_first("ced_abs"), needs_sweep=True, needs_entropy=True),
    "loss": Criterion(lowest_score_first("loss"), needs_sweep=True),
    "random": Criterion(random_order),
    "every_other": Criterion(every_other),
    "explicit": Criterion(explicit),
    "mse": Criterion(lowest_score_first("mse"), needs_sweep=True),
    "ld_pruner": Criterion(lowest_score_first("ld_pruner"), needs_sweep=True),
    "flux_lite": Criterion(lowest_score_first("flux_lite"), needs_sweep=True),
    "shortgpt": Criterion(lowest_score_first("shortgpt"), needs_sweep=True),
    "magnitude_l1": Criterion(lowest_score_first("magnitude_l1"), measure_magnitude),
    "magnitude_l2": Criterion(lowest_score_first("magnitude_l2"), measure_magnitude),
    "taylor": Criterion(lowest_score_first("taylor"), measure_taylor),
    "diff_pruning": Criterion(lowest_score_first("diff_pruning"), measure_diff_pruning),
    "spread_taylor": Criterion(spread_taylor, measure_diff_pruning),
    "learned": Criterion(by_learned_gates, measure_learned),
    "combined": Criterion(rank_average),
    "gradient_flow": Criterion(highest_score_first("gradient_flow"), measure=measure_gradient_flow),
    "recovery_race": Criterion(lowest_score_first("recovery_race"), needs_sweep=True, races=True),
}
CRITERIA_NEED_SWEEP = frozenset(name for name, criterion in CRITERIA.items() if criterion.needs_sweep)
