"""From the statistics of a sweep to one score per block and criterion, with jackknife standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds.importance.entropy import ESTIMATORS, Estimator, term_differences
from entprune_ds.importance.sweep_statistics import GroupStatistics, merge, merge_all

MAX_LEFT_OUT = 0.01
"""Largest share of entropy terms without spread; above it the entropy says nothing."""


@dataclass(frozen=True)
class Score:
    """A block's score and the standard error of it."""

    value: float
    standard_error: float


Scores = dict[str, dict[int, Score]]
"""{criterion: {original block index: Score}}."""


def score_blocks(
    groups: Sequence[GroupStatistics],
    kept_blocks: Sequence[int],
    estimator: str = "per_element",
    entropy_needed: bool = True,
) -> Scores:
    """Every leave-one-out score of every block. Deterministic: equal statistics give equal scores on all ranks.

    signed_ced = H(X | drop block) - H(X) and ced = |signed_ced| (EntPruner, arXiv 2511.21122, sec. 3.3), in nats;
    ced_abs = sum of the absolute term differences, which cannot cancel; loss = rise of the mean loss;
    mse = mean squared difference of an output element from the full model; ld_pruner = shift of the output's mean
    plus shift of its std, as norms over the elements (LD-Pruner, arXiv 2404.11936). The standard error is the
    jackknife over the groups (Efron & Stein 1981); ced takes that of signed_ced, since folding at 0 would
    hide the spread of a block whose sign is uncertain.

    Args:
        groups: statistics of two or more groups of draws, as `SweepStatistics.reduce` returns them.
        kept_blocks: blocks in the order of the sweep.
        estimator: a key of entropy.ESTIMATORS.
        entropy_needed: whether the blocks are ranked by an entropy score. If not, and too many terms have no
            spread (a fresh head), ced, signed_ced and ced_abs are absent from the result.

    Raises:
        ValueError: for an unknown estimator, or when an entropy is needed and too many terms have no spread,
            naming the blocks.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"entropy estimator `{estimator}` is not known. Choose one of {', '.join(ESTIMATORS)}.")
    entropy, total = ESTIMATORS[estimator], merge_all(groups)
    problem = _spread_problem(total, kept_blocks, entropy)
    if problem is not None and entropy_needed:
        raise ValueError(problem)
    values = _statistics(total, entropy)
    resampled = [_statistics(rest, entropy) for rest in _leave_one_group_out(groups)]
    errors = {name: jackknife_error(torch.stack([r[name] for r in resampled])) for name in values}
    values, errors = values | {"ced": values["signed_ced"].abs()}, errors | {"ced": errors["signed_ced"]}
    names = () if problem is not None else ("ced", "signed_ced", "ced_abs")
    names = (*names, "loss", "mse", "ld_pruner")
    return {name: _by_block(kept_blocks, values[name], errors[name]) for name in names}


def _by_block(kept_blocks: Sequence[int], values: Tensor, errors: Tensor) -> dict[int, Score]:
    return {b: Score(v, e) for b, v, e in zip(kept_blocks, values.tolist(), errors.tolist(), strict=True)}


def left_out_terms(
    groups: Sequence[GroupStatistics], kept_blocks: Sequence[int], estimator: str = "per_element"
) -> dict[int, int]:
    """Number of entropy terms per block that have no spread in the full or the dropped model."""
    _, left_out = term_differences(merge_all(groups).outputs, ESTIMATORS[estimator])
    return dict(zip(kept_blocks, left_out.tolist(), strict=True))


def scores_as_json(scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
    """Plain values of decisions.jsonl: {criterion: {"block": {"value", "standard_error"}}}."""
    return {
        name: {str(b): {"value": s.value, "standard_error": s.standard_error} for b, s in by_block.items()}
        for name, by_block in scores.items()
    }


def _statistics(group: GroupStatistics, entropy: Estimator) -> dict[str, Tensor]:
    """Every score of every block on some draws: {name: (L,) float64}."""
    differences, _ = term_differences(group.outputs, entropy)
    count, elements = group.outputs.count, group.outputs.mean[0].numel()
    return {
        "signed_ced": differences.sum(1),
        "ced_abs": differences.abs().sum(1),
        "loss": (group.loss[1:] - group.loss[0]) / count,
        "mse": group.squared_deviation[1:] / (count * elements),
        "ld_pruner": _shift(group.outputs.mean) + _shift(group.outputs.variance().sqrt()),
    }


def _shift(of_variants: Tensor) -> Tensor:
    """Norm of the difference from variant 0. (1+L,C,H,W) -> (L,)."""
    return (of_variants[1:] - of_variants[:1]).flatten(1).norm(dim=1)


def _leave_one_group_out(groups: Sequence[GroupStatistics]) -> list[GroupStatistics]:
    """For each of G groups the merge of all others, in O(G) merges through running prefixes and suffixes."""
    suffixes = [groups[-1]]
    for group in reversed(groups[1:-1]):
        suffixes.insert(0, merge(group, suffixes[0]))  # suffixes[i] holds groups i+1 and later
    prefix, rest = groups[0], [suffixes[0]]
    for i in range(1, len(groups) - 1):
        rest.append(merge(prefix, suffixes[i]))
        prefix = merge(prefix, groups[i])
    return [*rest, prefix]


def jackknife_error(resampled: Tensor) -> Tensor:
    """Standard error from statistics (G,L) that each leave one of G groups out -> (L,)."""
    groups = resampled.shape[0]
    return (resampled.var(0, correction=0) * (groups - 1)).sqrt()


def _spread_problem(total: GroupStatistics, kept_blocks: Sequence[int], entropy: Estimator) -> str | None:
    """The sentence for the user when too many terms have no spread, else None."""
    differences, left_out = term_differences(total.outputs, entropy)
    limit = MAX_LEFT_OUT * differences.shape[1]
    bad = [f"block {b}: {n}" for b, n in zip(kept_blocks, left_out.tolist(), strict=True) if n > limit]
    if not bad:
        return None
    return (
        f"more than {MAX_LEFT_OUT:.0%} of the {differences.shape[1]} entropy terms have no spread over the draws "
        f"in the full model or without the block ({'; '.join(bad)}). An untrained model, a constant data set or "
        "too few draws do that: train first, or choose another criterion. Nothing was removed."
    )
