"""The mask of soft pruning, without a model: costs, budget, energy, what goes, and how gates fold."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from entprune_ds.config import Config, PruneConfig, SoftConfig, TrainConfig, problems_of
from entprune_ds.macs import blocks_macs, unit_macs
from entprune_ds.models.registry import model_config
from entprune_ds.pruning.folding import column_factors, elements
from entprune_ds.pruning.soft_mask import (
    Costs,
    Removal,
    SoftState,
    choose,
    energy,
    masked_macs,
    open_mask,
    raised,
    standardised,
    updated,
)  # fmt: skip
from entprune_ds.pruning.surgery import Narrowing
from entprune_ds.soft_budget import budget, least_depth, least_share, removal_steps, target_share, update_steps
from tests.reference.toys import draws, random_dit
from tests.tiny import tiny_config

COSTS = Costs(head=0.02, channel=0.01, rest=0.05, widths={0: (2, 10), 3: (2, 10), 5: (1, 8)})
BLOCKS_ONLY = Costs(head=0.0, channel=0.0, rest=0.25, widths={b: (1, 1) for b in range(4)})


def mask_of(values: dict[int, dict[str, list | float]]) -> dict[int, dict[str, torch.Tensor]]:
    return {b: {k: torch.tensor(v, dtype=torch.float64) for k, v in g.items()} for b, g in values.items()}


def random_mask(seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {b: {"gate": (), "attn.gate": (h,), "mlp.gate": (c,)} for b, (h, c) in COSTS.widths.items()}
    return {
        b: {k: torch.rand(s, generator=generator, dtype=torch.float64) for k, s in g.items()} for b, g in shapes.items()
    }


# ---------------------------------------------------------------- multiply-accumulates and budget


def test_the_macs_of_a_published_block_are_those_counted_by_hand():
    model = model_config("DiT-XL/2")
    units = unit_macs(model)
    tokens, width = 256, 1152
    assert units.channel == 2 * tokens * width == 589_824
    assert units.head == 4 * tokens * width * 72 + 2 * tokens**2 * 72 == 94_371_840
    assert units.rest == 6 * width**2 == 7_962_624
    assert units.total(16, 4608) == 4_235_821_056  # 4.236 G
    assert blocks_macs(model) == 28 * 4_235_821_056
    narrow = replace(model, kept_blocks=(3, 4), block_widths=((3, 8, 100),))
    assert blocks_macs(narrow) == 4_235_821_056 + 8 * 94_371_840 + 100 * 589_824 + 7_962_624


def soft_config(**soft: object) -> Config:
    config = tiny_config()
    return replace(config, train=replace(config.train, num_steps=100), soft=SoftConfig(**{"every": 5} | soft))


def test_the_budget_goes_from_all_to_the_target_as_scheduled():
    config = soft_config(target_macs=0.4, start_step=20, end_step=60, schedule="linear")
    assert [budget(config, step) for step in (0, 20, 30, 40, 60, 99)] == pytest.approx([1, 1, 0.85, 0.7, 0.4, 0.4])
    cubic = replace(config, soft=replace(config.soft, schedule="cubic"))
    assert [budget(cubic, s) for s in (20, 40, 60)] == pytest.approx([1, 0.4 + 0.6 / 8, 0.4])
    assert update_steps(config) == [25, 30, 35, 40, 45, 50, 55, 60]
    assert removal_steps(config) == [30, 40, 50, 60]
    assert removal_steps(replace(config, soft=replace(config.soft, removals=3))) == [35, 50, 60]
    assert update_steps(soft_config(every=0)) == removal_steps(soft_config(every=0)) == []
    depths = replace(soft_config(), prune=PruneConfig(target_depth=3))
    assert target_share(depths) == 0.75 and update_steps(depths)[-1] == 75


def test_the_least_that_can_remain():
    blocks = soft_config(target_macs=0.6)
    assert least_share(blocks) == 0.25 and least_depth(blocks) == 2
    heads = soft_config(target_macs=0.6, units=("head",))
    units = unit_macs(heads.model)
    assert least_share(heads) == pytest.approx(1 - units.head / units.total(2, 128)) and least_depth(heads) == 4
    assert least_depth(soft_config(target_macs=0.6, units=("block", "channel"))) == 1


# ---------------------------------------------------------------- energy


def test_macs_under_a_mask_are_those_of_what_is_open():
    everything = open_mask(COSTS.widths, ("block", "head", "channel")).mask
    assert masked_macs(everything, COSTS).item() == pytest.approx(0.19 + 0.19 + 0.15)
    assert masked_macs({b: {} for b in COSTS.widths}, COSTS).item() == pytest.approx(0.53)
    half = {b: {k: 0.5 * m for k, m in g.items()} for b, g in everything.items()}
    assert masked_macs(half, COSTS).item() == pytest.approx(0.5 * (0.15 + 0.5 * 0.38))
    closed = random_mask()
    closed[3]["gate"] = torch.zeros((), dtype=torch.float64)
    others = replace(COSTS, widths={b: w for b, w in COSTS.widths.items() if b != 3})
    assert masked_macs(closed, COSTS) == masked_macs(closed, others)


def test_scores_are_counted_alike_within_a_kind_and_not_across_kinds():
    scores = mask_of({0: {"gate": 3.0, "mlp.gate": [1e-6, 3e-6]}, 1: {"gate": 1.0, "mlp.gate": [2e-6]}})
    z = standardised(scores)
    assert [z[0]["gate"].item(), z[1]["gate"].item()] == pytest.approx([1, -1])
    assert z[0]["mlp.gate"].tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5]) and z[1]["mlp.gate"].item() == 0
    assert standardised({0: {"gate": torch.tensor(5.0)}})[0]["gate"].item() == 0


def test_the_unit_with_the_highest_score_closes_first():
    mask = {b: {"gate": torch.tensor(1.0, dtype=torch.float64)} for b in range(4)}
    scores = standardised(
        {b: {"gate": torch.tensor(s, dtype=torch.float64)} for b, s in enumerate((-1.0, 4.0, 0.0, 1.0))}
    )
    for step in range(60):
        mask = updated(mask, scores, BLOCKS_ONLY, budget=1 - 0.5 * min(1, step / 30), weight=8, eta=0.05)
        values = [mask[b]["gate"].item() for b in range(4)]
        assert all(0 <= v <= 1 for v in values)
        if step == 10:
            assert values[1] == min(values) < values[3] and values[0] == 1
    assert values[1] == 0 and values[0] == 1
    assert choose(mask, scores, BLOCKS_ONLY, 0.5, 0.1, final=True).kept_blocks == (0, 2)
    assert masked_macs(mask, BLOCKS_ONLY).item() == pytest.approx(0.5, abs=0.1)


def test_an_update_is_a_step_down_the_energy():
    mask = random_mask()
    scores = standardised(random_mask(1))
    mean = {"gate": (0.19 + 0.19 + 0.15) / 3, "attn.gate": 0.02, "mlp.gate": 0.01}
    moved = updated(mask, scores, COSTS, budget=0.2, weight=3.0, eta=0.01)
    at = energy(mask, scores, COSTS, 0.2, 3.0).item()
    for b, g in mask.items():
        for kind, m in g.items():
            for i in range(m.numel()):
                nudged = {c: {k: v.clone() for k, v in h.items()} for c, h in mask.items()}
                nudged[b][kind].view(-1)[i] += 1e-6
                slope = (energy(nudged, scores, COSTS, 0.2, 3.0).item() - at) / 1e-6
                expected = min(1.0, max(0.0, m.view(-1)[i].item() - 0.01 / mean[kind] * slope))
                assert moved[b][kind].view(-1)[i].item() == pytest.approx(expected, abs=1e-5)
    assert energy(moved, scores, COSTS, 0.2, 3.0).item() < at


# ---------------------------------------------------------------- what goes


def zeros_like(mask: dict) -> dict:
    return {b: {k: torch.zeros_like(m) for k, m in g.items()} for b, g in mask.items()}


def test_what_is_closed_goes_and_the_strongest_of_a_block_stays():
    ones = [1.0] * 10
    mask = mask_of({
        0: {"gate": 0.01, "attn.gate": [1.0, 1.0], "mlp.gate": ones},
        3: {"gate": 1.0, "attn.gate": [0.05, 0.02], "mlp.gate": [0.0, 0.5, *ones[2:]]},
        5: {"gate": 1.0, "attn.gate": [0.0], "mlp.gate": [1.0] * 7 + [0.0]},
    })  # fmt: skip
    removal = choose(mask, zeros_like(mask), COSTS, target=0.1, threshold=0.1, final=False)
    assert removal.kept_blocks == (3, 5)
    narrow = {3: Narrowing(heads=(0,), channels=tuple(range(1, 10))), 5: Narrowing(channels=tuple(range(7)))}
    assert removal.narrow == narrow
    assert removal.macs == pytest.approx(0.05 + 0.02 + 0.09 + 0.05 + 0.02 + 0.07)
    up = raised(mask, removal.kept_blocks, removal.narrow, 0.1)
    assert up[0]["gate"] == 0.01 and up[3]["attn.gate"].tolist() == [0.1, 0.02] and up[5]["attn.gate"].tolist() == [0.1]
    assert up[3]["mlp.gate"][0] == 0 and up[3]["mlp.gate"][1] == 0.5


def test_the_last_removal_reaches_the_target_and_goes_no_further():
    mask = random_mask()
    for target in (0.5, 0.3, 0.11):
        removal = choose(mask, zeros_like(mask), COSTS, target, 0.1, final=True)
        smallest_unit = 0.19
        assert target - smallest_unit < removal.macs <= target + 1e-9  # a block is 0.19 at most
    weak_block = open_mask(COSTS.widths, ("block", "channel")).mask
    weak_block[3]["gate"] *= 0.3
    removal = choose(weak_block, zeros_like(weak_block), COSTS, 0.5, 0.1, final=True)
    assert removal.kept_blocks == (0, 3, 5) and removal.macs == pytest.approx(0.5)  # three channels, not a whole block
    closed_block = choose(weak_block, zeros_like(weak_block), COSTS, 0.5, 0.31, final=True)
    assert closed_block == Removal((0, 5), {}, pytest.approx(0.34))  # the mask had done without it
    enough = choose(mask, zeros_like(mask), COSTS, 0.53, 0.99, final=False)
    assert enough == Removal((0, 3, 5), {}, pytest.approx(0.53))
    equal = {b: {"gate": torch.tensor(0.5, dtype=torch.float64)} for b in range(4)}
    scores = {b: {"gate": torch.tensor(s)} for b, s in enumerate((1.0, 2.0, 2.0, 0.0))}
    assert choose(equal, scores, BLOCKS_ONLY, 0.5, 0.1, final=True).kept_blocks == (0, 3)
    assert choose(equal, scores, BLOCKS_ONLY, 0.75, 0.1, final=True).kept_blocks == (0, 1, 3)
    assert choose(equal, scores, BLOCKS_ONLY, 0.01, 0.6, final=False).kept_blocks == (3,)


def test_the_state_survives_a_checkpoint_and_a_removal():
    state = SoftState(random_mask(), random_mask(1), step=7, updates=3)
    again = SoftState.from_json(json.loads(json.dumps(state.to_json())))
    assert (again.step, again.updates) == (7, 3)
    assert all(torch.equal(m, again.mask[b][k]) for b, g in state.mask.items() for k, m in g.items())
    assert torch.equal(again.gates()[3]["mlp.gate"], state.mask[3]["mlp.gate"] / state.folded[3]["mlp.gate"])
    before = state.mask[3]["mlp.gate"].clone()
    state.shrink((3, 5), {3: Narrowing(heads=(1,), channels=(0, 9))})
    assert list(state.mask) == list(state.folded) == [3, 5]
    assert state.mask[3]["mlp.gate"].tolist() == before[[0, 9]].tolist() and len(state.folded[3]["attn.gate"]) == 1
    state.fold()
    assert all(torch.equal(m, torch.ones_like(m)) for g in state.gates().values() for m in g.values())


# ---------------------------------------------------------------- folding


def test_folded_weights_give_what_the_gates_gave():
    model = random_dit(depth=3, kept_blocks=(0, 2), block_widths=((2, 1, 24),))
    z_t, t, labels, _ = draws(model, 4)
    plain = model(z_t, t, labels)
    generator = torch.Generator().manual_seed(3)
    gates = {
        int(b): {k: torch.rand(g.shape, generator=generator, dtype=g.dtype) for k, g in block.gates().items()}
        for b, block in model.blocks.items()
    }
    for b, block in model.blocks.items():
        block.set_gates(gates[int(b)])
    gated = model(z_t, t, labels)
    assert (gated - plain).abs().max() > 0.01
    touched = set()
    with torch.no_grad():
        for name, p in model.named_parameters():
            factors = column_factors(name, gates, head_size=8)
            if factors is not None:
                touched.add(name.split(".", 2)[2])
                cuts = [0, 5, p.numel() // 2 + 3, p.numel()]  # as ranks hold it
                of_element = torch.cat([elements(factors, a, b).expand(b - a) for a, b in itertools.pairwise(cuts)])
                p.view(-1).mul_(of_element)
    for block in model.blocks.values():
        block.set_gates({})
    assert (model(z_t, t, labels) - gated).abs().max() < 1e-12
    assert touched == {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    assert column_factors("blocks.2.attn.proj.bias", {2: {"attn.gate": torch.zeros(1)}}, 8) == 1
    assert column_factors("blocks.20.attn.proj.weight", {2: gates[2]}, 8) is None


# ---------------------------------------------------------------- settings

BAD = [
    ({"units": ("block", "layer")}, "`soft.units` must be some of block, head, channel"),
    ({"units": ()}, "`soft.units` must be some of"),
    ({"schedule": "cosine"}, "`soft.schedule` must be one of linear, cubic"),
    ({"eta": 0.0}, "`soft.eta` must be above 0"),
    ({"eta": 0.2}, "`soft.eta` x `soft.budget_weight` must be at most 0.5, got 1.6"),
    ({"threshold": 1.0}, "`soft.threshold` must lie between 0 and 1"),
    ({"end_step": 100}, "`soft.start_step` < `soft.end_step` < `train.num_steps` must hold, got 0, 100, 100"),
    ({"every": 40}, "`soft.removals` (4) needs as many updates, one every 40 steps between 0 and 75 (three quarters"),
    ({"target_macs": None}, "`soft.target_macs` or `prune.target_depth` must say how much remains"),
    ({"target_macs": 1.5}, "`soft.target_macs` must lie between 0 and 1, got 1.5"),
    (
        {"target_macs": 0.2},
        "`soft.target_macs` is 0.2, but with `soft.units` ['block'] and",
    ),
    ({"every": -1}, "`soft.every` must be at least 0, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_impossible_settings_are_refused_with_a_remedy(changes, message):
    found = problems_of(soft_config(**{"target_macs": 0.5} | changes))
    assert len(found) == 1 and found[0].startswith(message)


def test_a_protected_block_has_no_gate_and_stays():
    mask = open_mask(COSTS.widths, ("block", "head"), protected=(3,)).mask
    assert list(mask[3]) == ["attn.gate"] and list(mask[0]) == ["gate", "attn.gate"]
    scores = standardised({b: {k: m + b for k, m in g.items()} for b, g in mask.items()})
    assert scores[5]["gate"] > scores[0]["gate"] and "gate" not in scores[3]
    closed = {b: {k: m * 0 for k, m in g.items()} for b, g in mask.items()}
    assert choose(closed, scores, COSTS, 0.01, 0.1, final=True).kept_blocks == (3,)

    config = replace(soft_config(target_macs=0.5), prune=PruneConfig(protected_blocks=(0, -1)))
    assert problems_of(config) == [] and least_share(config) == 0.5 and least_depth(config) == 2
    more = problems_of(replace(config, prune=PruneConfig(protected_blocks=(0, 1, -1))))
    assert len(more) == 1 and "`prune.protected_blocks` [0, 1, 3] at least 0.75 stays" in more[0]
    unknown = problems_of(replace(config, prune=PruneConfig(protected_blocks=(9,))))
    assert len(unknown) == 1 and "`prune.protected_blocks` names [9]" in unknown[0]


def test_soft_pruning_takes_the_place_of_the_checks():
    from entprune_ds.pruning.schedule import planned_checks, schedule_problem

    config = replace(soft_config(), prune=PruneConfig(target_depth=2), train=TrainConfig(num_steps=100))
    assert problems_of(replace(config, train=replace(tiny_config().train, num_steps=100))) == []
    assert schedule_problem(config) is None
    assert planned_checks(config) == [] and planned_checks(replace(config, soft=SoftConfig())) != []
    score_only = problems_of(replace(config, prune=PruneConfig(target_depth=2, score_only=True)))
    assert any("`prune.score_only` has no meaning with soft pruning" in p for p in score_only)
