"""Narrow blocks: the model that they make, and resizes that drop attention heads and MLP channels while training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.config import config_from_dict, load_config, model_problems, problems_of, to_dict, to_yaml
from entprune_ds.engine.balance import cut_by_cost, stage_costs
from entprune_ds.engine.layer_costs import LayerCosts, conditions_of, costs_as_json, costs_from_json, measure_costs
from entprune_ds.engine.transfer import narrowed_ranges
from entprune_ds.export import write_model
from entprune_ds.interop.safetensors import open_export, save_model
from entprune_ds.interop.source import keep_blocks, loaded_model
from entprune_ds.interop.weights import open_weights, starting_problems
from entprune_ds.models.dit import DiT
from entprune_ds.models.registry import count_macs, count_parameters, parameter_shapes
from entprune_ds.pruning.surgery import Narrowing, narrowed, selections
from tests.ranks import run_ranks
from tests.test_training import losses, words
from tests.tiny import MODEL, load_model, tiny_draws
from tests.workers.narrow import narrow_config
from tests.workers.pipeline import load_state, pipe_config

FULL = pytest.mark.full
WIDE = replace(MODEL, num_heads=4)
STAYS = {1: Narrowing(heads=(1, 3), channels=tuple(range(3, 128, 5))), 2: Narrowing(channels=(7,))}
NARROW = narrowed(WIDE, (0, 1, 2, 3), STAYS)
MUTATIONS = ["swapped_qk", "other_heads", "first_channels", "swapped_moments", "forgotten_step", "stale_ema"]


def random_model(config, seed: int = 0) -> DiT:
    """Random values everywhere, float64: gates that are zero would hide every difference."""
    model, generator = DiT(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.requires_grad_(False)


def narrowed_state(model: DiT, stays: dict[int, Narrowing]) -> dict[str, torch.Tensor]:
    """State dict of a model with what stays of it."""
    config, state = narrowed(WIDE, WIDE.blocks, stays), model.state_dict()
    for name, selection in selections(WIDE, stays).items():
        flat = state[name].reshape(-1)
        state[name] = flat[selection.mask(0, flat.numel())].reshape(parameter_shapes(config)[name])
    return state


def test_a_narrow_model_computes_what_the_wide_one_does_without_those_heads_and_channels():
    wide, narrow = random_model(WIDE), DiT(NARROW).double()
    narrow.load_state_dict(narrowed_state(wide, STAYS))
    draws = tiny_draws(narrow_config(0, "fp32", 1), 0, 0, 1)
    inputs = (draws.z_t.double(), draws.t.double(), draws.labels)
    whole = wide(*inputs)
    for block, stays in STAYS.items():
        attention, mlp = wide.blocks[str(block)].attn, wide.blocks[str(block)].mlp
        for head in set(range(4)) - set(stays.heads or range(4)):
            attention.proj.weight[:, 8 * head : 8 * head + 8] = 0
        for channel in set(range(128)) - set(stays.channels or range(128)):
            mlp.fc2.weight[:, channel] = 0
    assert (narrow(*inputs) - wide(*inputs)).abs().max() <= 1e-12
    assert (narrow(*inputs) - whole).abs().max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_of_a_parameter_is_narrowed_alone(data):
    indices = st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple)
    stays = {1: Narrowing(heads=data.draw(indices), channels=data.draw(indices))}
    small = replace(WIDE, hidden_size=16, mlp_ratio=0.25)
    for name, selection in selections(small, stays).items():
        whole = torch.arange(torch.Size(selection.shape).numel()).reshape(selection.shape)
        expected = whole.index_select(selection.axis, torch.tensor(selection.kept)).reshape(-1)
        assert tuple(parameter_shapes(narrowed(small, (1,), stays))[name]) == tuple(
            whole.index_select(selection.axis, torch.tensor(selection.kept)).shape
        )
        cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=4)))
        for start, stop in zip([0, *cuts], [*cuts, whole.numel()], strict=True):
            ((_, first, last),) = narrowed_ranges([(name, start, stop)], {name: selection})
            part = whole.reshape(-1)[start:stop][selection.mask(start, stop)]
            assert torch.equal(part, expected[first:last]), (name, start, stop)


def test_widths_are_settings_that_survive_and_are_checked():
    word = "model.block_widths=[[1,2,25],[2,4,1]]"
    tiny = ["model.depth=4", "model.hidden_size=32", "model.num_heads=4"]
    config = load_config([*tiny, word])
    assert config.model.block_widths == NARROW.block_widths == ((1, 2, 25), (2, 4, 1))
    assert config_from_dict(to_dict(config)) == config
    assert "block_widths" in to_yaml(config) and problems_of(config) == []
    for wrong, what in {
        ((4, 1, 1),): "present blocks ([0, 1, 2, 3])", ((2, 1, 1), (1, 1, 1)): "in order", ((1, 5, 1),): "got 5 and 1",
        ((1, 0, 1),): "got 0 and 1", ((1, 1, 129),): "got 1 and 129", ((1, 4, 128),): "full width out",
        ((1, 1, 1), (1, 2, 2)): "each once", ((1, 1, 0),): "1 to 128 MLP channels",
    }.items():  # fmt: skip
        (problem,) = model_problems(replace(WIDE, block_widths=wrong))
        assert problem.startswith("`model.block_widths`") and what in problem
    assert "present blocks" in model_problems(replace(NARROW, kept_blocks=(0, 2)))[0]
    assert NARROW.keeping((0, 2)).block_widths == ((2, 4, 1),) and not model_problems(NARROW.keeping((0, 2)))


def test_sizes_count_the_narrow_blocks_as_they_are():
    heads, channels = (4 - 2) * 8, (128 - 25) + (128 - 1)
    assert count_parameters(WIDE) - count_parameters(NARROW) == heads * (4 * 32 + 3) + channels * (2 * 32 + 1)
    tokens = 4
    assert count_macs(WIDE) - count_macs(NARROW) == tokens * (4 * 32 * heads + 2 * 32 * channels) + 32 * heads


def test_narrowing_is_counted_from_what_a_block_has_now():
    again = narrowed(NARROW, (1, 2), {1: Narrowing(heads=(1,), channels=(24,))})
    assert again.kept_blocks == (1, 2) and again.block_widths == ((1, 1, 1), (2, 4, 1))
    with pytest.raises(ValueError, match="heads that stay in block 1 must be sorted indices below 2"):
        narrowed(NARROW, (1, 2), {1: Narrowing(heads=(2,))})
    assert narrowed(WIDE, WIDE.blocks, {}) == replace(WIDE, kept_blocks=WIDE.blocks)


def test_exports_carry_the_widths_and_formats_without_them_are_refused(tmp_path):
    model = random_model(NARROW).float()
    state = model.state_dict()
    out = save_model(tmp_path / "export", list(state), state.__getitem__, NARROW, {"weights": "ema", "step": 3})
    source = open_export(out)
    assert source.model == NARROW and load_model(out)[1]["model"]["block_widths"] == [[1, 2, 25], [2, 4, 1]]
    draws = tiny_draws(narrow_config(0, "fp32", 1), 0, 0, 1)
    inputs = (draws.z_t, draws.t, draws.labels)
    assert torch.equal(loaded_model(source)(*inputs), model(*inputs))
    for form in ("official", "diffusers"):
        with pytest.raises(ValueError, match=r"blocks \[1, 2\] are narrower. Use format=entprune, or drop them"):
            write_model(source, tmp_path / f"{form}.pt", form)
        assert not (tmp_path / f"{form}.pt").exists()
    even = keep_blocks(source, (0, 3))
    assert even.model.block_widths == () and write_model(even, tmp_path / "even.pt", "official")
    write_model(keep_blocks(source, (0, 2)), tmp_path / "again", "entprune")
    assert open_export(tmp_path / "again").model.block_widths == ((2, 4, 1),)
    diffusion = narrow_config(0, "fp32", 1).diffusion
    assert starting_problems(NARROW, diffusion, out) == starting_problems(NARROW.keeping((0, 2)), diffusion, out) == []
    (problem,) = starting_problems(WIDE, diffusion, out)
    assert "`model.block_widths` is [], but" in problem and "[[1, 2, 25], [2, 4, 1]]" in problem
    assert open_weights(out, given={"block_widths": NARROW.block_widths}).model == NARROW
    with pytest.raises(ValueError, match=r"`model\.block_widths` is"):
        open_weights(out, given={"block_widths": ((1, 2, 25),)})


def test_pipelines_are_cut_by_the_cost_of_every_width():
    config = pipe_config(1, "fp32", 2, num_heads=4)
    costs = LayerCosts(10, 40, 10, 0, 2, ((2, 25, 10), (4, 1, 20)), conditions_of(config))
    assert stage_costs(costs, NARROW, (2, 2)) == [60, 70] and stage_costs(costs, NARROW, (3, 1)) == [80, 50]
    assert cut_by_cost(config, NARROW, 2, 1, costs) == (2, 2)
    assert cut_by_cost(config, replace(NARROW, block_widths=((2, 2, 25), (3, 2, 25))), 2, 1, costs) == (1, 3)
    assert costs.know(config, NARROW, 1) and not costs.know(config, replace(NARROW, block_widths=((1, 2, 26),)), 1)
    assert not costs.know(replace(config, train=replace(config.train, micro_batch_size=4)), NARROW, 1)
    assert not costs.know(replace(config, model=replace(config.model, compile=True)), NARROW, 1)
    assert costs_from_json(json.loads(json.dumps(costs_as_json(costs)))) == costs
    assert costs_from_json([1, 2, 3, 4, 5]) is costs_from_json(None) is None
    wide = replace(config.model, hidden_size=128, input_size=16, block_widths=((0, 1, 8), (2, 1, 8), (3, 4, 8)))
    best = {"full": math.inf}
    for _ in range(5):  # other processes disturb some of them
        measured = measure_costs(config, wide, 1)
        best["full"] = min(best["full"], measured.block)
        for heads, channels, cost in measured.narrow:
            best[heads, channels] = min(best.get((heads, channels), cost), cost)
    assert best.keys() == {"full", (1, 8), (4, 8)}
    assert best[1, 8] < best[4, 8] < best["full"]


ONE = {"heads": [1, 2, 3], "channels": [*range(0, 128, 3)]}
FIRST = {"kept": [0, 1, 3], "narrow": {"1": ONE, "3": {"channels": [1, 5, 77]}}}
SECOND = {"1": {"heads": [0, 2], "channels": [*range(1, 43, 2), 42]}, "3": {"heads": [2, 3], "channels": [0, 2]}}
LAST = {"kept": [1, 3], "narrow": SECOND}  # at ZeRO-3 the public calls cannot set odd sizes, which the first step has
TWICE = ([FIRST, LAST], [[1, 2, 22], [3, 2, 2]])
ALL_STAY = ([{"kept": [0, 1, 2, 3], "narrow": {"2": {"heads": [3], "channels": [*range(1, 128, 2)]}}}], [[2, 1, 64]])
STAGED = ([FIRST, LAST | {"cut": [0, 2]}], TWICE[1])
MATRIX = [
    pytest.param(3, 2, "fp32", 1, *TWICE),
    *(pytest.param(zero, 2, "fp32", 1, *TWICE, marks=FULL) for zero in (0, 1, 2)),
    *(pytest.param(zero, 2, "bf16", 1, *TWICE, marks=FULL) for zero in (0, 1)),
    pytest.param(3, 4, "bf16", 1, *ALL_STAY, marks=FULL),
    *(pytest.param(zero, world, "fp32", 2, *STAGED, marks=FULL) for zero, world in ((0, 2), (1, 4))),
]


@pytest.mark.parametrize(("zero_stage", "world_size", "dtype", "stages", "resizes", "widths"), MATRIX)
def test_a_narrowed_engine_continues_like_a_fresh_one(tmp_path, zero_stage, world_size, dtype, stages, resizes, widths):
    common = {"folder": str(tmp_path), "zero_stage": zero_stage, "dtype": dtype, "stages": stages}
    live = run_ranks("tests.workers.narrow:live", world_size, **common, resizes=resizes)
    arguments = {"last": resizes[-1], "widths": widths, "steps": live[0]["steps"]}
    mutations = MUTATIONS if (zero_stage, dtype) == (1, "fp32") else MUTATIONS[:1]
    fresh = run_ranks("tests.workers.narrow:fresh", world_size, **common, **arguments, mutations=["none", *mutations])
    expected, state = load_state(tmp_path, "live"), load_state(tmp_path, "fresh_none")
    for rank in range(world_size):
        assert fresh[rank]["none"] == live[rank]["losses"]
        assert live[rank]["widths"] == widths and live[rank]["count"] == 0 and live[rank]["seen"]
        assert all(sent == minimum for sent, minimum in live[rank]["traffic"])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for mutation in mutations:
        wrong = load_state(tmp_path, f"fresh_{mutation}")
        assert any(not torch.equal(wrong[name], expected[name]) for name in expected), mutation


def test_impossible_narrowings_are_refused_on_all_ranks_and_change_nothing():
    for result in run_ranks("tests.workers.narrow:refusals", 2, zero_stage=1):
        empty, beyond, several, dropped, nothing, negative, different = result["messages"]
        assert "heads that stay in block 1 must be sorted indices below 4, at least one, each once, got []" in empty
        assert "got [0, 4]" in beyond and "got [-1, 0]" in negative
        for part in ("channels that stay in block 1", "got [1, 1]", "block 9 cannot be narrowed", "got [1, 0]"):
            assert part in several
        assert "block 1 cannot be narrowed: it is not among the blocks that stay, [0, 2, 3]" in dropped
        assert "no block gets narrower" in nothing
        assert "differs between rank 0 and ranks [1]" in different
        assert result["same"] and len(result["losses"]) == 2


@FULL
def test_a_decision_to_narrow_is_carried_out_recorded_and_resumed(digits, tmp_path):
    more = ("prune.criterion=explicit", "prune.explicit_order=[0,2,3]", "parallel.ds_config=zero3_fp32",
            "train.keep_checkpoints=1")  # fmt: skip
    narrow = {"1": {"heads": [1], "channels": [*range(2, 42)]}, "2": {"channels": [0]}}
    command = words(digits, tmp_path, "narrow", *more)
    ranks = run_ranks("tests.workers.narrow:run_and_resume", 2, words=command, narrow=narrow)
    run = tmp_path / "narrow"
    assert [r["status"] for r in ranks] == [0, 0]
    assert [losses(run)[step] for step in (3, 4)] == ranks[0]["losses"]
    manifests = [json.loads((run / f"checkpoints/step_{s:08d}/manifest.json").read_text()) for s in (0, 4, 12)]
    assert [m["block_widths"] for m in manifests] == [[], [[1, 1, 40], [2, 2, 1]], [[1, 1, 40]]]
    assert [m["kept_blocks"] for m in manifests] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 3]]
    decisions = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    assert [d["narrow"] for d in decisions] == [narrow | {"2": {"heads": None, "channels": [0]}}, {}]
    model, facts = load_model(Path(run / "model"))
    assert facts["model"]["block_widths"] == [[1, 1, 40]] and facts["model"]["kept_blocks"] == [1, 3]
    assert model.blocks["1"].attn.proj.weight.shape == (32, 16) and model.blocks["1"].mlp.fc1.bias.shape == (40,)
