"""Magnitude, Taylor and Diff-Pruning against autograd over the parameters themselves, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.config import DiffusionConfig, ScoreConfig
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.importance.magnitude import measure_magnitude
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.ntk import ntk_gram
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import Score
from entprune_ds.importance.taylor import measure_diff_pruning, measure_taylor
from tests.reference import gradients
from tests.reference.checks import toy_check
from tests.reference.toys import Apply, ToyModel, draws, mean_squared, random_dit
from tests.tiny import MODEL

SCORE = ScoreConfig(gradient_batches=3, gradient_batch_size=8, diff_pruning_threshold=0.5)


def dit_check(model: nn.Module, **sections: object) -> Measuring:
    """A check of a DiT whose targets fade with t, so that late times are nearly solved."""

    def draw(number: int, count: int, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_t, drawn, labels, target = draws(model, count, step=number)
        t = drawn if t is None else t
        with torch.no_grad():
            solved = model.double()(z_t, t, labels)
        return z_t, t, labels, solved + (target - solved) * (1 - t).view(-1, 1, 1, 1) ** 2

    return toy_check(model, draw, **({"score": SCORE} | sections))


def batch_losses(m: Measuring, model: nn.Module, purpose: str, t: Tensor | None) -> Tensor:
    """Loss of every draw (batches, size) with a graph to the parameters."""
    batches = [m.draw(purpose, 8, t) for _ in range(3)]
    return torch.stack([mean_squared(model(b.z_t, b.t, b.labels), b.target) for b in batches])


def agree(found: dict[int, Score], expected: tuple[dict[int, float], dict[int, float]], rel: float = 1e-10) -> None:
    assert list(found) == list(expected[0])
    assert [s.value for s in found.values()] == pytest.approx(list(expected[0].values()), rel=rel, abs=0)
    errors = [s.standard_error for s in found.values()]
    assert errors == pytest.approx(list(expected[1].values()), rel=100 * rel, abs=0) and min(errors) > 0


@pytest.mark.parametrize("chosen", [(), (0.25, 0.5)])
def test_taylor_equals_autograd_over_the_parameters(chosen):
    model = random_dit(kept_blocks=(1, 2, 10), depth=12)
    score = ScoreConfig(gradient_batches=3, gradient_batch_size=8, taylor_t=chosen)
    t = torch.tensor([*chosen] * 4, dtype=torch.float64) if chosen else None
    expected = gradients.taylor(model, list(batch_losses(dit_check(model), model, "taylor", t).mean(1)))
    agree(measure_taylor(dit_check(model, score=score))["taylor"], expected)


def test_single_precision_agrees_with_autograd_in_double():
    model = random_dit(depth=3)
    expected = gradients.taylor(model, list(batch_losses(dit_check(model), model, "taylor", None).mean(1)))
    m = dit_check(model, parts=ModuleParts(model, torch.float32))
    for block, score in measure_taylor(m)["taylor"].items():
        assert score.value == pytest.approx(expected[0][block], rel=1e-5)


def test_diff_pruning_sums_over_the_times_whose_loss_is_above_the_threshold():
    model = random_dit(depth=3)
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    losses = batch_losses(dit_check(model), model, "diff_pruning", t)  # (batches, times)
    of_t = losses.mean(0)
    counted = of_t > 0.5 * of_t.max()
    assert 0 < counted.sum() < 8
    agree(
        measure_diff_pruning(dit_check(model))["diff_pruning"],
        gradients.taylor(model, list(losses[:, counted].sum(1))),
    )


def test_magnitude_is_the_norm_of_all_weights_and_biases_of_a_block():
    model = random_dit(kept_blocks=(0, 7), depth=8)
    scores = measure_magnitude(dit_check(model))
    for block, module in model.blocks.items():
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        assert scores["magnitude_l1"][int(block)].value == pytest.approx(flat.norm(1).item(), rel=1e-12)
        assert scores["magnitude_l2"][int(block)].value == pytest.approx(flat.norm(2).item(), rel=1e-12)


# ---------------------------------------------------------------- chosen times


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_chosen_times_lie_in_the_training_range_of_a_flow(path):
    objective, latents = build_objective(MODEL, DiffusionConfig(path=path)), torch.ones(3, 1, 4, 4)
    labels, t = torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, 0.5, 0.999])
    common = dict(seed=1, purpose="x", step=0)
    found = objective.make_draws(latents, labels, range(3), **common, t=t)
    assert found.t.dtype == torch.float32 and 0 <= found.t[0] < 0.01 and found.t[1] == pytest.approx(0.5, abs=0.01)
    again = objective.make_draws(latents, labels, range(3), **common)
    assert not torch.equal(again.t, found.t)
    alone = objective.make_draws(latents[1:2], labels[1:2], [1], **common, t=t[1:2])
    assert torch.equal(alone.z_t, found.z_t[1:2])  # the noise is that of the slot


def test_chosen_times_are_timesteps_of_a_diffusion_model():
    from dataclasses import replace

    objective = build_objective(replace(MODEL, process="dit", learn_sigma=True), DiffusionConfig())
    chosen = torch.tensor([0.0, 0.5, 0.9999], dtype=torch.float64)
    found = objective.make_draws(
        torch.ones(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64), range(3), seed=1, purpose="x", step=0, t=chosen
    )
    assert found.t.tolist() == [0, 500, 999]


# ---------------------------------------------------------------- what cannot be scored


@pytest.mark.parametrize("measure", [measure_taylor, measure_diff_pruning])
def test_a_weight_that_is_not_finite_is_named_with_its_block_and_batch(measure):
    model = random_dit(depth=4)
    with torch.no_grad():
        model.blocks["2"].mlp.fc2.bias[3] = math.nan
    with pytest.raises(comm.DistributedError, match=r"output of block 2 is NaN or infinite in gradient batch 0"):
        measure(dit_check(model))


def test_a_gradient_that_is_not_finite_is_named_with_its_block():
    root = Apply(lambda x: x + (x.detach() - x).abs().sqrt())  # adds 0, with a slope of infinity
    model = ToyModel(nn.Sequential(), root, lambda x: 2 * x)
    model.blocks["0"] = OneLinear(4)
    with pytest.raises(comm.DistributedError, match=r"taylor gradient of block 0 is NaN or infinite"):
        measure_taylor(toy_check(model, toy_draws))


def test_infinite_weights_have_no_magnitude():
    model = random_dit(depth=3)
    with torch.no_grad():
        model.blocks["1"].attn.qkv.weight[0, 0] = math.inf
    with pytest.raises(comm.DistributedError, match=r"weights of block 1 are NaN or infinite"):
        measure_magnitude(dit_check(model))


class OneLinear(nn.Module):
    """x + W x."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.linear(x)


def toy_draws(number: int, count: int, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_t, target = torch.randn(
        2, count, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(number)
    ).unbind()
    return z_t, torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64), target


def test_a_block_without_a_graph_is_one_clear_error():
    m = toy_check(ToyModel(lambda x: 2 * x, lambda x: x.detach() + 1, lambda x: 3 * x), toy_draws)
    for measure in (measure_taylor, measure_diff_pruning):
        with pytest.raises(ValueError, match=r"output of block 1 carries no gradient.*Nothing was removed"):
            measure(m)


def test_inference_mode_is_one_clear_error():
    model = random_dit(depth=2)
    z_t, t, labels, _ = draws(model, 2)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"carries no gradient.*Leave that mode"):
            measure_taylor(dit_check(model))
        with pytest.raises(ValueError, match=r"carries no gradient.*Leave that mode"):
            ntk_gram(ModuleParts(model), [0, 1], z_t, t, labels, torch.ones_like)
