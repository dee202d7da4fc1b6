"""The flow objective and its samplers: formulas in float64, streams per example, exact solutions and orders."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from entprune_ds.diffusion.guidance import with_guidance
from entprune_ds.diffusion.interpolant import PATHS, expand
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.diffusion.samplers import SAMPLERS, euler, heun
from entprune_ds.rng import uniform_per_slot
from tests.reference.toys import draws, random_dit

SHAPE = (2, 3, 3)
linear_path = PATHS["linear"].mix
make_draws = FlowObjective().make_draws


def loss_per_example(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of the default objective, which does not look at t."""
    return FlowObjective().loss(prediction, target, torch.zeros(len(target)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (count,2,3,3) f32 and labels (count,) of ten classes."""
    return normal(count, *SHAPE, seed=1).float(), torch.arange(count) % 10


# ---------------------------------------------------------------- the path


def test_the_linear_path_is_the_formula():
    data, noise = normal(5, *SHAPE, seed=1), normal(5, *SHAPE, seed=2)
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    z_t, velocity = linear_path(data, noise, t)
    for n in range(5):
        torch.testing.assert_close(z_t[n], float(t[n]) * data[n] + (1 - float(t[n])) * noise[n], rtol=0, atol=1e-15)
    assert torch.equal(velocity, data - noise)
    assert torch.equal(z_t[0], noise[0]) and torch.equal(z_t[4], data[4])  # t = 1 is data


def test_the_velocity_is_the_derivative_of_the_path():
    data, noise, tiny = normal(4, *SHAPE, seed=1), normal(4, *SHAPE, seed=2), 1e-4
    t = torch.tensor([0.1, 0.3, 0.6, 0.8], dtype=torch.float64)
    _, velocity = linear_path(data, noise, t)
    difference = (linear_path(data, noise, t + tiny)[0] - linear_path(data, noise, t - tiny)[0]) / (2 * tiny)
    torch.testing.assert_close(difference, velocity, rtol=0, atol=1e-10)


def test_times_spread_over_any_shape():
    t = torch.arange(3.0)
    assert expand(t, torch.zeros(3, 2, 4, 4)).shape == (3, 1, 1, 1) and expand(t, torch.zeros(3)).shape == (3,)


# ---------------------------------------------------------------- draws


def test_draws_are_the_path_between_their_noise_and_the_data():
    latents, labels = batch(6)
    made = make_draws(latents, labels, range(6), seed=1, purpose="train", step=2)
    noise = latents - made.target
    t = made.t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(made.z_t, t * latents + (1 - t) * noise, rtol=0, atol=1e-6)
    assert torch.equal(made.labels, labels) and made.t.dtype == made.z_t.dtype == torch.float32


def test_draws_do_not_depend_on_how_the_slots_are_split():
    latents, labels = batch(12)
    arguments = dict(seed=3, purpose="train", step=7, label_dropout=0.5, null_label=10)
    whole = make_draws(latents, labels, range(12), **arguments)
    for slots in ([0], [11, 3], list(range(1, 12, 2)), list(range(6, 12))):
        part = make_draws(latents[slots], labels[slots], slots, **arguments)
        for key in ("z_t", "t", "labels", "target"):
            assert torch.equal(getattr(part, key), getattr(whole, key)[slots]), key


@pytest.mark.parametrize("change", [dict(seed=4), dict(purpose="validation"), dict(step=8), dict(slots=range(1, 5))])
def test_other_draws_have_other_noise_and_times(change):
    latents, labels = batch(4)
    arguments = dict(slots=range(4), seed=3, purpose="train", step=7)
    first, other = make_draws(latents, labels, **arguments), make_draws(latents, labels, **(arguments | change))
    assert not torch.isclose(first.t, other.t).any() and not torch.isclose(first.target, other.target).all(1).any()


def test_steps_and_slots_do_not_run_into_each_other():
    a, b = uniform_per_slot(0, "train", 1, [23]), uniform_per_slot(0, "train", 12, [3])
    assert not torch.equal(a, b) and torch.equal(a, uniform_per_slot(0, "train", 1, [23]))


def test_noise_times_and_dropout_are_independent_of_each_other():
    latents, labels = batch(2000)
    made = make_draws(latents, labels, range(2000), seed=0, purpose="train", step=0, label_dropout=0.5, null_label=10)
    noise = (latents - made.target).double()
    first, last = noise[:, 0, 0, 0], noise[:, 1, 2, 2]
    columns = [first, last, first.square(), last.square(), made.t.double(), (made.labels == 10).double()]
    off_diagonal = torch.corrcoef(torch.stack(columns)) - torch.eye(6, dtype=torch.float64)
    assert off_diagonal.abs().max() < 4 / math.sqrt(2000)
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.square().mean() - 1) < 4 * math.sqrt(2 / noise.numel())


def test_times_are_uniform_in_the_half_open_interval():
    latents, labels = batch(4000)
    t = make_draws(latents, labels, range(4000), seed=0, purpose="train", step=1).t.double()
    assert t.min() >= 0 and t.max() < 1
    assert abs(t.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    counts = torch.histc(t, bins=10, min=0, max=1)
    assert ((counts - 400).abs() < 4 * math.sqrt(4000 * 0.1 * 0.9)).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_labels_are_dropped_to_the_null_label_at_the_given_rate(rate):
    count = 4000
    latents, labels = batch(count)
    made = make_draws(latents, labels, range(count), seed=0, purpose="train", step=0, label_dropout=rate, null_label=10)
    dropped = made.labels == 10
    assert torch.equal(made.labels[~dropped], labels[~dropped]) and made.labels.dtype == torch.int64
    assert abs(dropped.double().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_dropping_labels_changes_nothing_else():
    latents, labels = batch(50)
    plain = make_draws(latents, labels, range(50), seed=0, purpose="train", step=0)
    dropped = make_draws(latents, labels, range(50), seed=0, purpose="train", step=0, label_dropout=0.9, null_label=10)
    assert torch.equal(plain.z_t, dropped.z_t) and torch.equal(plain.t, dropped.t)
    assert torch.equal(plain.labels, labels) and not torch.equal(dropped.labels, labels)


def test_draws_split_into_micro_batches_and_move_without_losing_precision():
    latents, labels = batch(10)
    made = make_draws(latents, labels, range(10), seed=0, purpose="train", step=0)
    parts = made.split(4)
    assert [len(p.t) for p in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([p.z_t for p in parts]), made.z_t)
    assert torch.equal(torch.cat([p.labels for p in parts]), made.labels)
    half, double = made.to(torch.device("cpu"), torch.bfloat16), made.to(torch.device("cpu"), torch.float64)
    assert half.z_t.dtype == torch.bfloat16
    assert torch.equal(half.t, made.t) and torch.equal(half.target, made.target)  # these two stay in single precision
    assert double.z_t.dtype == double.t.dtype == double.target.dtype == torch.float64
    assert half.labels.dtype == double.labels.dtype == torch.int64


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_square_of_each_example():
    prediction, target = normal(4, *SHAPE, seed=1), normal(4, *SHAPE, seed=2)
    loss = loss_per_example(prediction, target)
    for n in range(4):
        pairs = zip(prediction[n].flatten().tolist(), target[n].flatten().tolist(), strict=True)
        expected = sum((a - b) ** 2 for a, b in pairs)
        assert loss[n].item() == pytest.approx(expected / 18, rel=1e-14)
    assert not loss_per_example(target, target).any()


def test_the_loss_of_half_precision_is_formed_in_single_precision():
    prediction, target = normal(4, *SHAPE, seed=1).bfloat16(), normal(4, *SHAPE, seed=2).bfloat16()
    loss = loss_per_example(prediction, target)
    assert loss.dtype == torch.float32 and loss_per_example(prediction.double(), target).dtype == torch.float64
    torch.testing.assert_close(loss.double(), loss_per_example(prediction.double(), target.double()), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- samplers

LABELS = torch.zeros(3, dtype=torch.int64)
START = normal(3, *SHAPE)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_constant_velocity_is_followed_exactly(name, num_steps):
    velocity = normal(3, *SHAPE, seed=3)
    found = SAMPLERS[name](lambda z, t, y: velocity, START, LABELS, num_steps)
    torch.testing.assert_close(found, START + velocity, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("rate", [-1.5, 0.7])
def test_linear_decay_gives_the_known_powers(num_steps, rate):
    h = rate / num_steps
    found = euler(lambda z, t, y: rate * z, START, LABELS, num_steps)
    torch.testing.assert_close(found, START * (1 + h) ** num_steps, rtol=1e-13, atol=1e-13)
    found = heun(lambda z, t, y: rate * z, START, LABELS, num_steps)
    torch.testing.assert_close(found, START * (1 + h + h * h / 2) ** num_steps, rtol=1e-13, atol=1e-13)


def test_times_go_from_noise_to_data_in_equal_steps():
    seen: list[tuple[int, float]] = []

    def velocity(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert t.shape == (3,) and t.dtype == z.dtype and torch.equal(y, LABELS) and (t == t[0]).all()
        seen.append((len(seen), t[0].item()))
        return torch.zeros_like(z)

    euler(velocity, START, LABELS, 4)
    assert [t for _, t in seen] == [0, 0.25, 0.5, 0.75]
    seen.clear()
    heun(velocity, START, LABELS, 2)
    assert [t for _, t in seen] == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_doubling_the_steps_shrinks_the_error_by_the_order(name, order):
    def velocity(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # z' = 2 t z: z(1) = e z(0)
        return 2 * t.reshape(-1, 1, 1, 1) * z

    errors = [(SAMPLERS[name](velocity, START, LABELS, n) - math.e * START).abs().max() for n in (40, 80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.08)
    assert errors[-1] < (0.04 if order == 1 else 1e-4)


def test_euler_ends_at_the_data_of_a_straight_path():
    data = normal(3, *SHAPE, seed=9)
    found = euler(lambda z, t, y: (data - z) / (1 - t.reshape(-1, 1, 1, 1)), START, LABELS, 8)  # never asked at t = 1
    torch.testing.assert_close(found, data, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_the_precision_and_the_noise_and_record_no_gradient(name):
    for dtype in (torch.float32, torch.float64):
        noise = START.to(dtype).requires_grad_()
        before = noise.detach().clone()
        found = SAMPLERS[name](lambda z, t, y: z * t.reshape(-1, 1, 1, 1), noise, LABELS, 3)
        assert found.dtype == dtype and not found.requires_grad and torch.equal(noise, before)


# ---------------------------------------------------------------- guidance


def test_a_scale_of_one_is_the_model_itself():
    model = random_dit()
    assert with_guidance(model, 1.0, 3) is model and with_guidance(model, 1, 3) is model


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_is_the_formula(scale):
    model = random_dit()
    z_t, t, labels, _ = draws(model, 5)
    conditional, unconditional = model(z_t, t, labels), model(z_t, t, torch.full((5,), 3))
    assert (conditional - unconditional).abs().max() > 0.01
    found = with_guidance(model, scale, null_label=3)(z_t, t, labels)
    expected = (1 - scale) * unconditional + scale * conditional
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_guidance_runs_both_halves_in_one_doubled_batch():
    calls = []

    def model(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append((z, t, y))
        return y.reshape(-1, 1, 1, 1).double() + 0 * z

    t, labels = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([4, 5, 6])
    found = with_guidance(model, 3.0, null_label=10)(START, t, labels)
    [(z, times, both)] = calls
    assert torch.equal(z, torch.cat([START, START])) and torch.equal(times, torch.cat([t, t]))
    assert both.tolist() == [4, 5, 6, 10, 10, 10]
    assert found[:, 0, 0, 0].tolist() == [10 + 3 * (label - 10) for label in (4, 5, 6)]


def test_examples_of_a_guided_batch_do_not_see_each_other():
    model = random_dit()
    guided = with_guidance(model, 2.0, null_label=3)
    z_t, t, labels, _ = draws(model, 6)
    parts = [guided(z_t[i : i + 2], t[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(guided(z_t, t, labels), torch.cat(parts), rtol=1e-12, atol=1e-12)
