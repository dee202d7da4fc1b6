"""Learned gates: groups and masks, gradients against autograd over the whole masked model, and what is left behind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from entprune_ds import comm
from entprune_ds.config import LearnedConfig
from entprune_ds.importance.criteria import removal_order
from entprune_ds.importance.gates import Gates, split_into_groups
from entprune_ds.importance.learned import gated_gradients, measure_learned
from entprune_ds.importance.lora import SCALE, Adapters, new_adapters
from entprune_ds.importance.magnitude import measure_magnitude
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.taylor import measure_diff_pruning, measure_taylor
from entprune_ds.rng import generator_for
from tests.reference.checks import toy_check
from tests.reference.toys import ToyModel, draws, mean_squared, random_dit

FEW = LearnedConfig(steps=4, batch_size=6)


def dit_check(model: nn.Module, target_depth: int = 2, **more: object) -> Measuring:
    def draw(number: int, count: int, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_t, drawn, labels, target = draws(model, count, step=number)
        return z_t, drawn if t is None else t, labels, target

    return toy_check(model, draw, target_depth, **({"learned": FEW} | more))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(2, 8))
def test_groups_are_consecutive_and_each_keeps_and_drops_a_block(depth, target, size):
    target = min(target, depth - 1)
    blocks = tuple(range(3, 3 + 2 * depth, 2))
    groups = split_into_groups(blocks, target, size)
    stay = [int(g.masks[0].sum()) for g in groups]
    assert sum((g.blocks for g in groups), ()) == blocks and sum(stay) == target
    for group, stays in zip(groups, stay, strict=True):
        assert 0 < stays < len(group.blocks)
        assert len(group.masks) == math.comb(len(group.blocks), stays) == len(set(map(tuple, group.masks.tolist())))
        assert set(group.masks.sum(1).tolist()) == {float(stays)}
    for numbers in (stay, [len(g.blocks) - s for g, s in zip(groups, stay, strict=True)]):
        assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize(
    ("depth", "target", "expected"),
    [
        (28, 14, [(2, 4)] * 7),
        (12, 4, [(1, 4), (1, 4), (2, 4)]),
        (12, 11, [(11, 12)]),
        (28, 1, [(1, 28)]),
        (3, 3, [(3, 3)]),
    ],
)
def test_groups_of_known_depths(depth, target, expected):
    groups = split_into_groups(range(depth), target, 4)
    assert [(int(g.masks[0].sum()), len(g.blocks)) for g in groups] == expected


def test_a_sample_is_hard_and_its_gradient_that_of_the_soft_choice():
    gates = Gates(split_into_groups(range(8), 4, 4), scale=100.0)
    with torch.no_grad():
        gates.logits[0].copy_(torch.arange(6) / 100)
    keep = gates.sample(0.7, generator_for(0, "x"))
    assert set(keep.tolist()) <= {0.0, 1.0} and keep.view(2, 4).sum(1).tolist() == [2, 2]
    weights = torch.randn(8, dtype=torch.float64, generator=generator_for(1, "x"))
    keep.backward(weights)
    noise = generator_for(0, "x")
    for group, logits, part in zip(gates.groups, gates.logits, weights.split(4), strict=True):
        gumbel = -(-torch.rand(6, dtype=torch.float64, generator=noise).log()).log()
        p = torch.softmax((100 * logits.detach() + gumbel) / 0.7, 0)
        value = group.masks @ part  # of each mask
        assert torch.allclose(logits.grad, 100 / 0.7 * p * (value - p @ value), rtol=1e-10, atol=0)


def whole_loss(model: nn.Module, batch, keep: Tensor, adapters: dict[int, Adapters]) -> Tensor:
    """Loss of the gated model with W + 2 up down in the place of W, as one graph."""
    x, c = model.embed(batch.z_t, batch.t, batch.labels)
    for gate, (name, block) in zip(keep, model.blocks.items(), strict=True):
        changed = {
            f"{layer}.weight": block.get_submodule(layer).weight + SCALE * a.up @ a.down
            for layer, a in adapters[int(name)].items()
        }
        x = x + gate * (functional_call(block, changed, (x, c)) - x)
    return mean_squared(model.head(x, c)[:, : model.in_channels], batch.target).mean()


def test_gradients_equal_one_autograd_over_the_whole_masked_model():
    model = random_dit(kept_blocks=(0, 2, 5, 6), depth=7)
    m = dit_check(model)
    adapters = {b: new_adapters(m.parts.block(b), 3, 0, f"test/{b}", 0) for b in m.kept_blocks}
    for block in adapters.values():
        for name, adapter in block.items():
            adapter.up.data.normal_(0, 0.1, generator=generator_for(3, name))
    keep = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64, requires_grad=True)
    batch = m.draw("learned", 6)
    loss, gradient = gated_gradients(m, batch, keep.tolist(), adapters, 0)
    expected = whole_loss(model, batch, keep, adapters)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    factors = {b: [f for adapter in adapters[b].values() for f in adapter] for b in adapters}
    of_gates, *of_factors = torch.autograd.grad(expected, [keep, *factors[0], *factors[5]])
    assert torch.allclose(gradient, of_gates, rtol=1e-10, atol=0) and gradient.abs().min() > 0
    for factor, wanted in zip([*factors[0], *factors[5]], of_factors, strict=True):
        assert torch.allclose(factor.grad, wanted, rtol=1e-9, atol=1e-14) and wanted.abs().max() > 0
    assert all(f.grad is None for b in (2, 6) for f in factors[b])  # left out: no step of theirs


def test_fresh_adapters_change_nothing_and_trained_ones_lower_the_loss():
    model = random_dit(depth=3)
    m, keep = dit_check(model), [1.0, 0.0, 1.0]
    adapters = {b: new_adapters(m.parts.block(b), 8, 0, f"test/{b}", 0) for b in m.kept_blocks}
    none: dict[int, Adapters] = {b: {} for b in m.kept_blocks}
    batch = m.draw("learned", 6)
    first = gated_gradients(m, batch, keep, adapters, 0)[0]
    assert first == gated_gradients(m, batch, keep, none, 0)[0]
    optimizer = torch.optim.Adam([f for b in adapters.values() for a in b.values() for f in a], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        last = gated_gradients(m, batch, keep, adapters, 0)[0]
        optimizer.step()
    assert last < 0.9 * first


def test_the_target_set_is_the_union_of_the_most_probable_masks():
    scores = measure_learned(dit_check(random_dit(depth=6), 3))
    kept = [b for b, s in scores["learned_mask"].items() if s.value == 1]
    order = removal_order("learned", scores, range(6), target_depth=3)
    assert len(kept) == 3 and sorted(order[3:]) == kept
    chances = [scores["learned"][b].value for b in order]
    assert sum(chances) == pytest.approx(3) and chances[:3] == sorted(chances[:3])
    with pytest.raises(ValueError, match=r"blocks \[5\] have no learned gate"):
        removal_order(
            "learned", {n: {b: s for b, s in v.items() if b < 5} for n, v in scores.items()}, range(6), target_depth=3
        )


def test_the_mask_decides_where_the_single_probabilities_would_mislead():
    """Block 2 is in most masks that are likely together, but not in the likeliest one."""
    from entprune_ds.importance.scores import Score

    scores = {
        "learned": {b: Score(p, 0.0) for b, p in enumerate((0.4, 0.45, 0.6, 0.55))},
        "learned_mask": {b: Score(v, 0.0) for b, v in enumerate((1.0, 1.0, 0.0, 0.0))},
    }
    assert removal_order("learned", scores, range(4), target_depth=2) == [3, 2, 0, 1]


def test_a_number_that_is_not_finite_is_named_with_its_block_and_step():
    model = random_dit(depth=3)
    with torch.no_grad():
        model.blocks["0"].attn.proj.bias[0] = math.inf
        model.blocks["1"].attn.proj.bias[0] = math.inf
        model.blocks["2"].attn.proj.bias[0] = math.inf
    with pytest.raises(
        comm.DistributedError, match=r"output of block 0 is NaN or infinite in step 0 of the learned gates"
    ):
        measure_learned(dit_check(model))


def test_a_block_left_out_whose_output_is_not_finite_is_named_too():
    model = random_dit(depth=3)
    with torch.no_grad():
        model.blocks["1"].attn.proj.bias[0] = math.nan
    m = dit_check(model)
    with pytest.raises(comm.DistributedError, match=r"by the gates of blocks \[1\] is NaN or infinite in step 7"):
        gated_gradients(m, m.draw("learned", 6), [1.0, 0.0, 1.0], {b: {} for b in range(3)}, 7)


def test_gates_need_gradients():
    def draw(number: int, count: int, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_t = torch.randn(count, 2, 2, 2, dtype=torch.float64, generator=generator_for(number, "z"))
        return z_t, z_t[:, 0, 0, 0], torch.zeros(count, dtype=torch.int64), z_t

    m = toy_check(ToyModel(*[lambda x: x.detach() * 2] * 3), draw, 2, learned=FEW)
    with pytest.raises(ValueError, match=r"output of block \d carries no gradient"):
        measure_learned(m)


def test_measuring_leaves_the_model_its_gradients_its_hooks_and_the_global_rng_alone():
    model, fired = random_dit(depth=4).train(), []

    class LiveParts(ModuleParts):
        """A sharded view hands out the same block again and again: nothing may stay on it."""

        def block(self, index: int) -> nn.Module:
            return live.blocks[str(index)]

    live = random_dit(depth=4).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    weights, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    learned = replace(FEW, lora_learning_rate=1.0)
    for parts in (None, LiveParts(model)):
        for measure in (measure_magnitude, measure_taylor, measure_diff_pruning, measure_learned):
            measure(dit_check(model, parts=parts, learned=learned))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not fired and all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in [*model.state_dict().items(), *live.state_dict().items()])
    assert all(p.grad is None and not p.requires_grad for p in live.parameters())
    assert not any(m._forward_hooks for m in [*live.modules(), *model.modules()])
