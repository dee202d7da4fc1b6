"""Keep-sets that weigh scores against even spacing, against all sets there are."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.config import load_config
from entprune_ds.importance.criteria import removal_order
from entprune_ds.importance.evenness import even_keep_set, keep_set_value
from entprune_ds.importance.scores import Score


def value(keep: tuple[int, ...], values: dict[int, float], weight: float) -> float:
    """The definition, written out."""
    mean, spread = statistics.fmean(values.values()), statistics.pstdev(values.values())
    z = {b: (v - mean) / spread if spread else 0.0 for b, v in values.items()}
    ends = [min(values) - 1, *keep, max(values) + 1]
    mean_gap = (ends[-1] - ends[0]) / (len(keep) + 1)
    gaps = [(b - a) / mean_gap for a, b in itertools.pairwise(ends)]
    return sum(z[b] for b in keep) - weight * sum(g * g for g in gaps)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_keep_set_has_a_larger_value(data):
    blocks = sorted(data.draw(st.sets(st.integers(0, 12), min_size=1, max_size=9)))
    values = {b: data.draw(st.floats(-5, 5)) for b in blocks}
    target, weight = data.draw(st.integers(1, len(blocks))), data.draw(st.floats(0, 3))
    must_stay = data.draw(st.sets(st.sampled_from(blocks), max_size=target))
    found = even_keep_set(values, target, weight, must_stay)
    possible = (keep for keep in itertools.combinations(blocks, target) if must_stay <= set(keep))
    best = max(value(keep, values, weight) for keep in possible)
    assert list(found) == sorted(set(found)) and len(found) == target and set(found) <= set(blocks)
    assert value(found, values, weight) == pytest.approx(best, abs=1e-9)
    assert keep_set_value(found, values, weight) == pytest.approx(value(found, values, weight), abs=1e-9)


def test_its_ends_scores_alone_and_even_spacing_alone():
    values = {b: float(b) for b in range(11)}
    assert even_keep_set(values, 3, weight=0.0) == (8, 9, 10)
    assert even_keep_set(values, 3, weight=1e6) == (2, 5, 8)
    assert even_keep_set(dict.fromkeys(range(11), 7.0), 3) == (2, 5, 8)  # nothing to choose by but the gaps
    assert even_keep_set(values, 11) == tuple(range(11))


@pytest.mark.parametrize("target", [0, 4])
def test_more_blocks_than_there_are_cannot_stay(target):
    with pytest.raises(ValueError, match=f"{target} of 3 blocks cannot stay"):
        even_keep_set({0: 1.0, 1: 2.0, 2: 3.0}, target)
    with pytest.raises(ValueError, match="1 of 3 blocks cannot stay where 2 must"):
        even_keep_set({0: 1.0, 1: 2.0, 2: 3.0}, 1, must_stay=(0, 2))


CLUSTER = [2.0, 1.0, 1.5, 1.0, 2.6, 2.5, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
"""Scores of which the highest lie together at the end."""


def test_spread_taylor_keeps_high_scores_that_do_not_lie_together():
    scores = {"diff_pruning": {b: Score(v, 0.1) for b, v in enumerate(CLUSTER)}}
    alone = removal_order("diff_pruning", scores, range(12), target_depth=4)
    assert sorted(alone[-4:]) == [4, 9, 10, 11]
    spread = removal_order("spread_taylor", scores, range(12), target_depth=4)
    assert sorted(spread[-4:]) == sorted(even_keep_set(dict(enumerate(CLUSTER)), 4)) == [4, 5, 9, 10]
    values = [CLUSTER[b] for b in spread]
    assert values[:8] == sorted(values[:8]) and values[8:] == sorted(values[8:])  # on both sides the lowest first


@pytest.mark.parametrize("protected", [(0, 11), (1, 2), (5,), (0, 1, 2, 3)])
def test_protected_blocks_are_part_of_an_even_keep_set(protected):
    scores = {"diff_pruning": {b: Score(v, 0.1) for b, v in enumerate(CLUSTER)}}
    spread = removal_order("spread_taylor", scores, range(12), target_depth=4, protected=protected)
    best = max(
        (keep for keep in itertools.combinations(range(12), 4) if set(protected) <= set(keep)),
        key=lambda keep: value(keep, dict(enumerate(CLUSTER)), 1.0),
    )
    assert sorted(spread[-4:]) == list(best)
    even = sorted(removal_order("every_other", {}, range(12), target_depth=4, protected=protected)[-4:])
    assert even == {
        (0, 11): [0, 4, 7, 11], (1, 2): [1, 2, 7, 11], (5,): [0, 5, 7, 11], (0, 1, 2, 3): [0, 1, 2, 3],
    }[protected]  # fmt: skip


def test_spread_taylor_says_what_it_lacks():
    with pytest.raises(ValueError, match="no finite `diff_pruning` score"):
        removal_order("spread_taylor", {}, range(4), target_depth=2)
    assert load_config([f"preset={Path('digits_prune')}", "prune.criterion=spread_taylor"])
