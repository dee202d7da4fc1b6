"""The cut of a pipeline: exact against brute force, memory, ties; costs measured without touching anything."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.comm import DistributedError
from entprune_ds.engine import balance
from entprune_ds.engine.balance import best_cut, cut_by_cost, stage_costs
from entprune_ds.engine.checkpoint import Checkpoint
from entprune_ds.engine.layer_costs import LayerCosts, conditions_of, costs_as_json, measure_costs
from entprune_ds.run_state import saved_cut
from tests.workers.pipeline import pipe_config


def brute_force(costs, memory, num_stages, limit, present):
    """All contiguous cuts, the best first: slowest stage, bytes moved, layers per stage."""
    found = []
    for inner in combinations(range(1, len(costs)), num_stages - 1):
        bounds = [0, *inner, len(costs)]
        spans = list(pairwise(bounds))
        if limit is not None and any(sum(memory[a:b]) > limit for a, b in spans):
            continue
        moved = sum(
            memory[i] for s, (a, b) in enumerate(spans) for i in range(a, b) if present is not None and present[i] != s
        )
        found.append((max(sum(costs[a:b]) for a, b in spans), moved, tuple(b - a for a, b in spans)))
    return min(found, default=None)


@st.composite
def pipelines(draw):
    """Layers with few different costs, so that ties are common."""
    layers = draw(st.integers(1, 9))
    num_stages = draw(st.integers(1, layers))
    numbers = st.lists(st.integers(0, 4), min_size=layers, max_size=layers)
    present = draw(st.none() | st.lists(st.integers(0, num_stages - 1), min_size=layers, max_size=layers).map(sorted))
    return draw(numbers), draw(numbers), num_stages, draw(st.none() | st.integers(0, 20)), present


@settings(max_examples=400, deadline=None)
@given(pipelines())
def test_the_cut_is_the_one_of_brute_force(pipeline):
    expected = brute_force(*pipeline)
    if expected is None:
        with pytest.raises(ValueError, match="keeps each within"):
            best_cut(*pipeline)
    else:
        assert best_cut(*pipeline) == expected[2]


def test_blocks_are_cut_by_cost_and_stay_where_they_are_when_it_costs_nothing():
    config = pipe_config(1, "fp32", 2)
    assert cut_by_cost(config, config.model, 2, 1, LayerCosts(10, 10, 10)) == (2, 2)
    assert cut_by_cost(config, config.model, 2, 1, LayerCosts(30, 10, 10)) == (1, 3)
    assert stage_costs(LayerCosts(30, 10, 20), config.model, (1, 3)) == [40, 50]
    tie = LayerCosts(10, 20, 30)  # (1, 2) and (2, 1) of three blocks: the slowest costs 50 or 70
    three = pipe_config(1, "fp32", 2, kept_blocks=(0, 1, 3)).model
    assert cut_by_cost(config, three, 2, 1, tie) == (2, 1)
    even = LayerCosts(10, 20, 10)  # 50 and 30 or 30 and 50
    for stage_of_1, expected in ((0, (2, 1)), (1, (1, 2))):
        assert cut_by_cost(config, three, 2, 1, even, {0: 0, 1: stage_of_1, 3: 1}) == expected


def test_a_stage_keeps_within_the_memory_of_its_device(monkeypatch):
    config = pipe_config(1, "fp32", 2)
    costs = LayerCosts(50, 10, 10, activation_bytes=10**9)
    assert cut_by_cost(config, config.model, 2, 1, costs) == (0, 4)
    monkeypatch.setattr(balance, "_memory_limit", lambda: 9 * 10**9)  # 2 GB a layer in flight: at most four on a stage
    assert cut_by_cost(config, config.model, 2, 1, costs) == (1, 3)
    monkeypatch.setattr(balance, "_memory_limit", lambda: 5 * 10**9)
    with pytest.raises(DistributedError, match=r"within 5000000000 bytes\. Raise `parallel\.pipe_stages`"):
        cut_by_cost(config, config.model, 2, 1, costs)


def test_a_cut_is_used_again_only_where_layers_cost_the_same():
    config = pipe_config(1, "fp32", 1)
    costs = LayerCosts(10, 20, 30, 0, 2, (), conditions_of(config))

    def again(config, kept=(0, 1, 2, 3), cut=(4,), costs=costs):
        record = {"cut": list(cut), "costs": costs_as_json(costs)}
        return saved_cut(config, Checkpoint(Path(), {"kept_blocks": kept, "record": record}))

    assert again(config) == ((4,), costs)
    assert again(config, cut=(2, 2)) == (None, None)  # other stages
    assert again(replace(config, parallel=pipe_config(1, "bf16", 1).parallel)) == (None, None)
    assert again(replace(config, train=replace(config.train, micro_batch_size=4))) == (None, None)
    for switch in ("activation_checkpointing", "compile"):
        assert again(replace(config, model=replace(config.model, **{switch: True}))) == (None, None), switch
    assert again(config, costs=None) == ((4,), None)  # written before any measurement
    assert measure_costs(config, config.model, 1, 1).conditions == "cpu, torch.float32"


def test_costs_are_those_of_the_layers_and_measuring_touches_nothing():
    config = pipe_config(1, "fp32", 1, hidden_size=128, num_heads=4, input_size=16)
    before = torch.random.get_rng_state()
    costs = measure_costs(config, config.model, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert costs.block > 2 * costs.head > 0 and costs.stem > 0 and costs.micro_batch == 2
    tokens = 2 * 64 * 128 * 4  # bytes of one activation (N,T,D)
    assert 10 * tokens < costs.activation_bytes < 40 * tokens
