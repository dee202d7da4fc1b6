"""The gradient-flow criterion: exact against double backward, true to its definition, the same on any ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entprune_ds import comm
from entprune_ds.config import Config, ScoreConfig, problems_of
from entprune_ds.coordinator import measure
from entprune_ds.importance.criteria import removal_order
from entprune_ds.importance.gradient_flow import gradient_flow, measure_gradient_flow
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import ModuleParts
from tests.ranks import run_ranks
from tests.reference import gradient_flow as reference
from tests.reference.toys import CountingParts, ToyModel, draws, mean_squared, random_dit
from tests.tiny import tiny_config

KEPT = (0, 2, 3)


def planted_model() -> nn.Module:
    return random_dit(depth=4, kept_blocks=KEPT, block_widths=((2, 1, 24),))


def random_gates(model: nn.Module) -> reference.Gates:
    """Gates between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(0)
    return {
        b: {n: 0.5 + torch.rand(g.shape, generator=generator, dtype=g.dtype) for n, g in block.gates().items()}
        for b, block in model.blocks.items()
    }


def groups_of(model: nn.Module, count: int, size: int) -> list[Batch]:
    """Groups of fixed draws, this rank's share of each."""
    return [
        Batch(*(torch.tensor_split(c, comm.world_size())[comm.rank()] for c in draws(model, size, seed=4, step=g)))
        for g in range(count)
    ]


def mean_loss(model: nn.Module, groups: list[Batch]) -> Tensor:
    return torch.stack([mean_squared(model(g.z_t, g.t, g.labels), g.target) for g in groups]).mean()


def scores_on_ranks() -> dict:
    """What every rank finds; three draws a group, so that one of four ranks has none."""
    model = planted_model()
    parts = CountingParts(model)
    found = gradient_flow(parts, KEPT, groups_of(model, 4, 3), 12, mean_squared)
    plain = {b: {n: s.flatten().tolist() for n, s in of_block.items()} for b, of_block in found.rise.items()}
    errors = {b: {n: s.flatten().tolist() for n, s in of_block.items()} for b, of_block in found.error.items()}
    return {"norm": found.norm_squared, "rise": plain, "error": errors, "requests": parts.requests}


@pytest.mark.parametrize("gated", [False, True])
def test_every_gate_equals_double_backward_through_the_whole_model(gated):
    model = planted_model()
    gates = random_gates(model) if gated else {b: block.gates() for b, block in model.blocks.items()}
    groups = groups_of(model, 2, 5)
    norm, expected = reference.rises(model, lambda: mean_loss(model, groups), gates)
    if gated:
        for b, values in gates.items():
            model.blocks[b].set_gates(values)
    parts = CountingParts(model)
    found = gradient_flow(parts, KEPT, groups, 10, mean_squared)
    assert found.norm_squared == pytest.approx(norm, rel=1e-12)
    for b in KEPT:
        assert list(found.rise[b]) == ["gate", "attn.gate", "mlp.gate"]
        for name, value in expected[str(b)].items():
            assert found.rise[b][name].shape == value.shape
            assert (found.rise[b][name] - value).abs().max() <= 1e-10 * value.abs().max()
    assert [len(found.rise[2][n]) for n in ("attn.gate", "mlp.gate")] == [1, 24]
    assert parts.requests == [0, 2, 3, 3, 2, 0, 0, 2, 3, 3, 2, 0]


def test_lowering_a_gate_raises_the_squared_norm_as_predicted():
    model = planted_model()
    groups = groups_of(model, 2, 8)
    found = gradient_flow(ModuleParts(model), KEPT, groups, 16, mean_squared)
    signs = set()
    for b in KEPT:
        for name, gate in model.blocks[str(b)].gates().items():
            for unit in range(0, gate.numel(), 7):
                lowered = gate.clone()
                lowered.view(-1)[unit] = 0.99
                after = reference.norm_squared(model, lambda: mean_loss(model, groups), {str(b): {name: lowered}})
                predicted = 0.01 * found.rise[b][name].view(-1)[unit].item()
                curvature = 1e-5 * found.norm_squared  # what a tiny score drowns in
                assert after.item() - found.norm_squared == pytest.approx(predicted, rel=0.05, abs=curvature)
                signs.add(predicted > 0)
                if name == "gate":
                    assert after.item() - found.norm_squared == pytest.approx(predicted, rel=0.05)
    assert signs == {True, False}


def test_ranks_find_what_one_process_finds():
    alone = scores_on_ranks()
    together = run_ranks("tests.test_gradient_flow:scores_on_ranks", 4)
    for rank in together:
        assert rank["requests"] == alone["requests"]
        assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-12)
        for what in ("rise", "error"):
            for b, of_block in alone[what].items():
                for name, values in of_block.items():
                    assert rank[what][str(b)][name] == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert together[0] == together[3]


def test_the_error_is_that_of_the_groups_along_the_mean_gradient():
    model = planted_model()
    groups, weights = groups_of(model, 5, 4), list(model.blocks.parameters())
    found = gradient_flow(ModuleParts(model), KEPT, groups, 20, mean_squared)
    v = torch.autograd.grad(mean_loss(model, groups), weights)
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    model.blocks["2"].set_gates({"gate": gate})
    of_groups = []
    for group in groups:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(mean_loss(model, [group]), weights, create_graph=True)
        along = sum((a * b).sum() for a, b in zip(v, gradients, strict=True))
        of_groups.append(-2 * torch.autograd.grad(along, gate)[0])
    values = torch.stack(of_groups)
    assert found.rise[2]["gate"].item() == pytest.approx(values.mean().item(), rel=1e-9)
    assert found.error[2]["gate"].item() == pytest.approx((values.std() / 5**0.5).item(), rel=1e-9)


class Scaling(nn.Module):
    """x + gate * f x with one trainable matrix f, f = strength * I."""

    def __init__(self, strength: float):
        super().__init__()
        self.f = nn.Linear(4, 4, dtype=torch.float64)
        nn.init.zeros_(self.f.bias)
        self.f.weight.data = strength * torch.eye(4, dtype=torch.float64)
        self.register_buffer("gate", None, persistent=False)

    def gates(self) -> dict[str, Tensor]:
        return {"gate": torch.ones((), dtype=torch.float64)}

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + (1 if self.gate is None else self.gate) * self.f(x)


def planted_check() -> tuple[nn.Module, Measuring]:
    """Block 0 doubles the stream, blocks 1 and 2 hardly change it; the target is 1.1 x the output."""
    model = ToyModel()
    model.blocks.update({str(i): Scaling(s) for i, s in enumerate((1.0, 0.01, 0.05))})
    config = replace(Config(), score=ScoreConfig(draws=64, batch_size=32, gradient_batches=4, gradient_batch_size=8))
    taken = []

    def draw(purpose: str, count: int) -> Batch:
        taken.append(purpose)
        z_t = torch.randn(count, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(len(taken)))
        zeros = torch.zeros(count, dtype=torch.int64)
        return Batch(z_t, zeros.double(), zeros, 1.1 * 2 * 1.01 * 1.05 * z_t)

    m = Measuring(
        parts=ModuleParts(model), kept_blocks=(0, 1, 2), config=config, check=3, draw=draw, loss_fn=mean_squared
    )
    return model, m


def test_it_alone_removes_the_block_whose_removal_raises_the_gradient_most():
    _, m = planted_check()
    prune = replace(m.config.prune, criterion="gradient_flow")
    scores = measure(replace(m, config=replace(m.config, prune=prune)))
    names = ("ced", "ced_abs", "loss", "every_other", "gradient_flow")
    first = {name: removal_order(name, scores, m.kept_blocks, target_depth=2)[0] for name in names}
    assert first.pop("gradient_flow") == 0
    assert 0 not in first.values()
    norms = {}
    for index in m.kept_blocks:  # the truth: the squared norm over what stays, when each is really gone
        rest, _ = planted_check()
        del rest.blocks[str(index)]
        batch = m.draw("truth", 32)
        loss = mean_squared(_forward(rest, batch.z_t), batch.target).mean()
        norms[index] = sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(rest.blocks.parameters())))
    assert max(norms, key=norms.get) == 0


def _forward(model: nn.Module, z_t: Tensor) -> Tensor:
    x, c = model.embed(z_t, z_t[:, 0, 0, 0], z_t)
    for block in model.blocks.values():
        x = block(x, c)
    return model.head(x, c)


@pytest.mark.parametrize("fault", ["nan", "untrained"])
def test_bad_numbers_end_the_check_with_one_clear_error(fault):
    model, m = planted_check()
    if fault == "nan":
        model.blocks["1"].f.weight.data[0, 0] = torch.nan
        expected = r"check 3: block 1 gives NaN or infinite activations on batch 0 .*Nothing was removed"
    else:
        m = replace(m, loss_fn=lambda prediction, target, t: 0 * prediction.flatten(1).sum(1))
        expected = r"check 3: the squared norm of the gradient by the blocks is zero.*untrained.*Nothing was removed"
    m = replace(m, parts=ModuleParts(model))
    with pytest.raises(comm.DistributedError, match=expected):
        measure_gradient_flow(m)


def test_too_few_draws_are_refused():
    config = tiny_config()
    score = ScoreConfig(gradient_batches=1)
    prune = replace(config.prune, criterion="gradient_flow", target_depth=2)
    problems = problems_of(replace(config, prune=prune, score=score))
    assert problems == ["`score.gradient_batches` must be at least 2, got 1."]
    assert problems_of(replace(config, prune=prune)) == []


def test_gates_of_one_and_no_gates_are_the_same_model():
    model = planted_model()
    z_t, t, labels, _ = draws(model, 3)
    plain = model(z_t, t, labels)
    assert "gate" not in " ".join(model.state_dict())
    for block in model.blocks.values():
        block.set_gates(block.gates())
    assert torch.equal(model(z_t, t, labels), plain)
    model.blocks["3"].set_gates({"gate": torch.zeros((), dtype=torch.float64)})
    short = random_dit(depth=4, kept_blocks=(0, 2), block_widths=((2, 1, 24),))
    assert torch.equal(model(z_t, t, labels), short(z_t, t, labels))
