"""From the statistics of a sweep to one score per block and criterion, with jackknife standard errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from entprune_ds.importance.entropy import FORMS, Estimator, MomentEstimator
from entprune_ds.importance.entropy_cells import Cells, EntropyGroups
from entprune_ds.importance.jackknife import Resampled, indistinguishable, leave_one_out
from entprune_ds.importance.sweep_statistics import GroupStatistics, merge, merge_all

MAX_LEFT_OUT = 0.01
"""Largest share of entropy terms without spread; above it the entropy says nothing."""
TOO_FEW_FOR_ERRORS = (
    "the entropy says nothing once a group of draws is left out, as standard errors need it: a cell has too few draws. "
    "Raise `score.draws`, or lower `score.batch_size`, `score.knn_k` or the number of cells. Nothing was removed."
)
MOST_GROUPS = 16
"""Groups that the jackknife leaves out one by one; more are put together, for the cost of an entropy each."""


@dataclass(frozen=True)
class Score:
    """A block's score and the standard error of it."""

    value: float
    standard_error: float
    same_as: tuple[int, ...] | None = None
    """Blocks whose score cannot be told apart from this one; None where that was not looked at."""
    draws: int | None = None
    """Draws that the score is of, where it is known."""


Scores = dict[str, dict[int, Score]]
"""{criterion: {original block index: Score}}."""


def score_blocks(
    groups: Sequence[GroupStatistics],
    kept_blocks: Sequence[int],
    entropy: EntropyGroups | None = None,
    entropy_needed: bool = True,
    confidence: float | None = None,
) -> Scores:
    """Every leave-one-out score of every block. Deterministic: equal statistics give equal scores on all ranks.

    Args:
        groups, kept_blocks, entropy, entropy_needed: see `resample_scores`.
        confidence: at which pairs of blocks are told apart, for Score.same_as; None leaves it open.
    """
    resampled = resample_scores(groups, kept_blocks, entropy, entropy_needed)
    return as_scores(resampled, kept_blocks, confidence, sum(group.outputs.count for group in groups))


def as_scores(
    resampled: dict[str, Resampled], kept_blocks: Sequence[int], confidence: float | None, draws: int
) -> Scores:
    """Values, standard errors and, with a confidence, the blocks that each cannot be told apart from."""
    scores: Scores = {}
    for name, score in resampled.items():
        same = {} if confidence is None else indistinguishable(score, kept_blocks, confidence)
        pairs = zip(kept_blocks, score.values.tolist(), score.errors.tolist(), strict=True)
        scores[name] = {b: Score(v, e, same.get(b), None if confidence is None else draws) for b, v, e in pairs}
    return scores


def resample_scores(
    groups: Sequence[GroupStatistics],
    kept_blocks: Sequence[int],
    entropy: EntropyGroups | None = None,
    entropy_needed: bool = True,
) -> dict[str, Resampled]:
    """Every leave-one-out score of every block, with the values that leave one group of draws out.

    signed_ced = H(X | drop block) - H(X) and ced = |signed_ced| (EntPruner, arXiv 2511.21122, sec. 3.3), in nats;
    ced_abs = sum of the absolute term differences, which cannot cancel (absent for an entropy of a single term);
    loss = rise of the mean loss; mse = mean squared difference of an output element from the full model; ld_pruner =
    shift of the output's mean plus shift of its std, as norms over the elements (LD-Pruner, arXiv 2404.11936). The
    replicates of ced keep the sign that signed_ced has over all draws, since folding them at 0 would hide the spread
    of a block whose sign is uncertain.

    Args:
        groups: statistics of two or more groups of draws, as `SweepStatistics.reduce` returns them.
        kept_blocks: blocks in the order of the sweep.
        entropy: of the same draws; None is per_element of all of them.
        entropy_needed: whether the blocks are ranked by an entropy score. If not, and too many terms have no
            spread (a fresh head), ced, signed_ced and ced_abs are absent from the result.

    Raises:
        ValueError: when an entropy is needed and too many terms have no spread, naming the blocks, or when a cell
            has too few draws for it.
    """
    entropy = pooled_entropy(groups) if entropy is None else entropy
    groups = _put_together(groups, merge)
    values, rest = _statistics(merge_all(groups)), [_statistics(r) for r in leave_one_out(groups, merge)]
    others = {name: Resampled(values[name], torch.stack([r[name] for r in rest])) for name in values}
    entropies = _entropy_scores(entropy, kept_blocks, entropy_needed)
    return entropies | others


PER_ELEMENT = MomentEstimator(FORMS["per_element"])


def pooled_entropy(groups: Sequence[GroupStatistics], estimator: Estimator = PER_ELEMENT) -> EntropyGroups:
    """The entropy of all draws together by a MomentEstimator, from the moments that the sweep has anyway."""
    return EntropyGroups(estimator, Cells(), [[group.outputs] for group in groups])


def _entropy_scores(entropy: EntropyGroups, kept_blocks: Sequence[int], needed: bool) -> dict[str, Resampled]:
    entropy = replace(entropy, kept=_put_together(entropy.kept, entropy.merge))
    terms, left_out = entropy.differences()
    problem = _spread_problem(terms.shape[1], left_out.tolist(), kept_blocks)
    if problem is not None:
        if needed:
            raise ValueError(problem)
        return {}
    rest = []
    for part, lost in entropy.replicates():
        rest.append((part.sum(1), part.abs().sum(1)))
        if (lost - left_out).max() > MAX_LEFT_OUT * terms.shape[1]:  # an error of 0 would pass for certainty
            if needed:
                raise ValueError(TOO_FEW_FOR_ERRORS)
            return {}
    signed = Resampled(terms.sum(1), torch.stack([plain for plain, _ in rest]))
    sign = torch.where(signed.values < 0, -1.0, 1.0).to(signed.values)
    found = {"ced": Resampled(signed.values.abs(), signed.replicates * sign), "signed_ced": signed}
    if terms.shape[1] > 1:
        found["ced_abs"] = Resampled(terms.abs().sum(1), torch.stack([absolute for _, absolute in rest]))
    return found


G = TypeVar("G")


def _put_together(groups: Sequence[G], merge: Callable[[G, G], G]) -> list[G]:
    """At most MOST_GROUPS groups, of as many neighbours each as that takes."""
    size = -(-len(groups) // MOST_GROUPS)
    return [functools.reduce(merge, groups[i : i + size]) for i in range(0, len(groups), size)]


def left_out_terms(groups: Sequence[GroupStatistics], kept_blocks: Sequence[int]) -> dict[int, int]:
    """Number of elements per block that have no spread in the full or the dropped model."""
    _, left_out = pooled_entropy(groups).differences()
    return dict(zip(kept_blocks, left_out.tolist(), strict=True))


def scores_as_json(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Plain values of decisions.jsonl: {criterion: {"block": {"value", "standard_error"}}}.

    With "same_as" and "draws" where they are known.
    """
    return {name: {str(b): _score_as_json(s) for b, s in by_block.items()} for name, by_block in scores.items()}


def _score_as_json(score: Score) -> dict[str, Any]:
    known: dict[str, Any] = {"value": score.value, "standard_error": score.standard_error}
    if score.same_as is not None:
        known["same_as"] = list(score.same_as)
    return known if score.draws is None else known | {"draws": score.draws}


def _statistics(group: GroupStatistics) -> dict[str, Tensor]:
    """Every score that is no entropy, of every block on some draws: {name: (L,) float64}."""
    count, elements = group.outputs.count, group.outputs.mean[0].numel()
    return {
        "loss": (group.loss[1:] - group.loss[0]) / count,
        "mse": group.squared_deviation[1:] / (count * elements),
        "ld_pruner": _shift(group.outputs.mean) + _shift(group.outputs.variance().sqrt()),
    }


def _shift(of_variants: Tensor) -> Tensor:
    """Norm of the difference from variant 0. (1+L,C,H,W) -> (L,)."""
    return (of_variants[1:] - of_variants[:1]).flatten(1).norm(dim=1)


def _spread_problem(terms: int, left_out: Sequence[int], kept_blocks: Sequence[int]) -> str | None:
    """The sentence for the user when too many of the entropy terms have no spread, else None."""
    bad = [f"block {b}: {n}" for b, n in zip(kept_blocks, left_out, strict=True) if n > MAX_LEFT_OUT * terms]
    if not bad:
        return None
    return (
        f"more than {MAX_LEFT_OUT:.0%} of the {terms} entropy terms have no spread over the draws "
        f"in the full model or without the block ({'; '.join(bad)}). An untrained model, a constant data set or "
        "too few draws do that: train first, or choose another criterion. Nothing was removed."
    )
