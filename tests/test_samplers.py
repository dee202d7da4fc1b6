"""Samplers on Gaussian data, where each is an affine map: exact mean and covariance, 20,000 samples, orders."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from entprune_ds.config import DiffusionConfig, ModelConfig, SampleConfig
from entprune_ds.diffusion.ddpm import space_timesteps
from entprune_ds.diffusion.dopri5 import dopri5
from entprune_ds.diffusion.interpolant import PATHS, sampling_range, sde_range
from entprune_ds.diffusion.prediction import PREDICTIONS
from entprune_ds.diffusion.sampling import build_sampler
from tests.reference import gaussian, processes
from tests.reference.gaussian import SHAPE, D, Line

NUM_STEPS, SAMPLES = 20, 20_000
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
FLOWS = [(path, kind) for path in PATHS for kind in PREDICTIONS]
SDES = [
    *[("linear", "velocity", form, "mean") for form in FORMS],
    *[("linear", "velocity", "sigma", last) for last in ("none", "tweedie", "euler")],
    *[(path, kind, "sbdm", "mean") for path, kind in FLOWS if (path, kind) != ("linear", "velocity")],
    *[("vp", "noise", "linear", "none"), ("gvp", "score", "increasing-decreasing", "tweedie")],
]


def flow_case(sampler: str, path: str, kind: str) -> tuple[dict, list[Line]]:
    """Settings of an ODE sampler and what it must give."""
    start, end = sampling_range(path, kind)
    expected = gaussian.after_ode(sampler, path, NUM_STEPS, start, end)
    return dict(path=path, kind=kind, sampler=sampler, num_steps=NUM_STEPS), expected


def sde_case(path: str, kind: str, form: str, last_step: str) -> tuple[dict, list[Line]]:
    """Settings of an SDE sampler and what it must give; enough steps for the diffusion `constant` to be stable."""
    size = 0.0 if last_step == "none" else 0.04
    start, end = sde_range(path, kind, form, size)
    expected = gaussian.after_sde(path, 2 * NUM_STEPS, start, end, form, 0.8, last_step, size)
    settings = dict(path=path, kind=kind, sampler="sde", num_steps=2 * NUM_STEPS, sde_diffusion=form, sde_norm=0.8)
    return settings | dict(sde_last_step=last_step), expected


def chain_case(sampler: str, eta: float) -> tuple[dict, list[Line]]:
    """Settings of a diffusion sampler and what it must give."""
    timesteps = list(space_timesteps(NUM_STEPS))
    expected = gaussian.after_ddpm(timesteps) if sampler == "ddpm" else gaussian.after_ddim(timesteps, eta)
    return dict(path="", kind="", sampler=sampler, num_steps=NUM_STEPS, ddim_eta=eta), expected


def cases() -> list:
    """(settings, expected lines) by name, made when asked for."""
    made = [
        pytest.param(flow_case, (s, *flow), id=f"{s}-{'-'.join(flow)}") for s in ("euler", "heun") for flow in FLOWS
    ]
    made += [pytest.param(sde_case, sde, id=f"sde-{'-'.join(sde)}") for sde in SDES]
    chains = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.6), ("ddim", 1.0)]
    return made + [pytest.param(chain_case, c, id=f"{c[0]}-{c[1]}") for c in chains]


def run(settings: dict, noise: Tensor, noise_at) -> Tensor:
    """Samples of the best model."""
    keys = dict(settings)
    path, kind = keys.pop("path"), keys.pop("kind")
    if path:
        model, net = ModelConfig(in_channels=SHAPE[0]), gaussian.flow_model(path, kind)
        diffusion = DiffusionConfig(path=path, prediction=kind)
    else:
        model, net = ModelConfig(process="dit", in_channels=SHAPE[0], learn_sigma=True), gaussian.chain_model
        diffusion = DiffusionConfig()
    labels = torch.zeros(len(noise), dtype=torch.int64)
    return build_sampler(model, diffusion, SampleConfig(**keys))(net, noise, labels, noise_at)


def exact_moments(settings: dict) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the samples, from what the sampler makes of zeros and of unit vectors.

    One unit in the start or in the noise of one step at a time: D (1 + steps) images besides that of zeros.
    """
    steps = settings["num_steps"]
    units = torch.zeros(1 + D * (1 + steps), 1 + steps, D, dtype=torch.float64)
    for i in range(1 + steps):
        for j in range(D):
            units[1 + i * D + j, i, j] = 1.0
    units = units.view(len(units), 1 + steps, *SHAPE)
    found = run(settings, units[:, 0], lambda step: units[:, 1 + step]).flatten(1)
    columns = found[1:] - found[0]
    return found[0], columns.T @ columns


@pytest.mark.parametrize(("case", "arguments"), cases())
def test_mean_and_covariance_are_those_of_the_discrete_process(case, arguments):
    settings, lines = case(*arguments)
    mean, covariance = gaussian.moments(lines)
    found_mean, found_covariance = exact_moments(settings)
    torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_covariance, covariance, rtol=1e-9, atol=1e-9)
    generator = torch.Generator().manual_seed(0)

    def normal(step: int = -1) -> Tensor:
        return torch.randn(SAMPLES, *SHAPE, generator=generator)

    check_samples(run(settings, normal(), normal), mean, covariance)


def check_samples(samples: Tensor, mean: Tensor, covariance: Tensor, errors: float = 4.0) -> None:
    """Sample mean and covariance lie within 4 standard errors of the exact ones."""
    x = samples.double().flatten(1)
    variances = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < errors * (variances / len(x)).sqrt()).all()
    spread = ((variances[:, None] * variances[None] + covariance**2) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < errors * spread).all()


@pytest.mark.parametrize(("path", "kind"), FLOWS)
def test_dopri5_follows_the_flow(path, kind):
    start, end = sampling_range(path, kind)
    mean, covariance = gaussian.moments(gaussian.after_flow(path, start, end))
    noise = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(0))
    settings = dict(path=path, kind=kind, sampler="dopri5", atol=1e-6, rtol=1e-3)
    check_samples(run(settings, noise, None), mean, covariance)


# ---------------------------------------------------------------- orders


def flow_error(lines: list[Line], path: str) -> float:
    """Largest error of mean and standard deviation against the exact flow."""
    exact = gaussian.after_flow(path, *sampling_range(path, "velocity"))
    pairs = zip(lines, exact, strict=True)
    return max(max(abs(a.mean - b.mean), abs(a.variance**0.5 - b.variance**0.5)) for a, b in pairs)


def sampled_lines(settings: dict) -> list[Line]:
    """Mean and variance of every coordinate, exact, as the sampler itself makes them."""
    mean, covariance = exact_moments(settings)
    mean, variance = gaussian.BASIS.T @ mean, (gaussian.BASIS.T @ covariance @ gaussian.BASIS).diagonal()
    return [Line(0, 0, m, v) for m, v in zip(mean.tolist(), variance.tolist(), strict=True)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order", "counts"), [("euler", 1, (80, 160, 320)), ("heun", 2, (40, 80, 160))])
def test_ode_samplers_have_their_order(path, sampler, order, counts):
    errors = [
        flow_error(sampled_lines(dict(path=path, kind="velocity", sampler=sampler, num_steps=n)), path) for n in counts
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_ddim_has_order_one():
    errors = []
    bar = processes.alpha_bar(999)
    for count in (50, 100, 200):
        settings = dict(path="", kind="", sampler="ddim", num_steps=count)
        worst = 0.0
        for line, exact in zip(sampled_lines(settings), gaussian.lines(), strict=True):
            factor = (exact.lam / (bar * exact.lam + 1 - bar)) ** 0.5  # the flow from timestep 999 to the data
            mean = exact.mu - factor * bar**0.5 * exact.mu
            worst = max(worst, abs(line.mean - mean), abs(line.variance**0.5 - factor))
        errors.append(worst)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("form", ["sigma", "linear", "increasing-decreasing"])
def test_euler_maruyama_has_weak_order_one(form):
    errors = []
    for count in (100, 200, 400):
        settings = dict(path="linear", kind="velocity", sampler="sde", num_steps=count, sde_diffusion=form)
        found = sampled_lines(settings | dict(sde_last_step="none"))
        pairs = zip(found, gaussian.lines(), strict=True)
        errors.append(max(max(abs(a.mean - b.mu), abs(a.variance - b.lam)) for a, b in pairs))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_the_error_of_dopri5_follows_its_tolerance():
    noise = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, errors = gaussian.after_flow("gvp", 0.0, 1.0), []
    factors = torch.tensor([line.variance**0.5 for line in exact], dtype=torch.float64)
    centre = torch.tensor([line.mean for line in exact], dtype=torch.float64)
    expected = (noise.flatten(1) @ gaussian.BASIS * factors + centre) @ gaussian.BASIS.T
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        settings = dict(path="gvp", kind="velocity", sampler="dopri5", atol=tolerance, rtol=tolerance)
        off = (run(settings, noise, None).flatten(1) - expected).abs().amax(1)
        errors.append(off.median().item() / tolerance)
    assert max(errors) < 5 and min(errors) > 0.2  # of the typical image: four elements estimate an error badly


# ---------------------------------------------------------------- one image at a time


def test_dopri5_is_torchdiffeqs_on_every_single_image():
    net, noise = gaussian.flow_model("gvp", "velocity"), torch.randn(6, *SHAPE, dtype=torch.float64)
    noise[0] *= 30  # needs other steps than the rest
    evaluations = []

    def count(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        evaluations.append(len(z))
        return net(z, t, y)

    limits = dict(atol=1e-6, rtol=1e-3)
    together = dopri5(net, noise, torch.zeros(6, dtype=torch.int64), start=0.0, end=1.0, **limits)
    times, end = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    for i in range(6):
        evaluations.clear()
        alone = dopri5(count, noise[i : i + 1], torch.zeros(1, dtype=torch.int64), start=0.0, end=1.0, **limits)
        ours = len(evaluations)
        evaluations.clear()
        theirs = odeint(lambda t, z: count(z, t.expand(1), None), noise[i : i + 1], times, method="dopri5",
                        options={"step_t": end}, **limits)[-1]  # fmt: skip
        torch.testing.assert_close(alone, theirs, rtol=0, atol=1e-12)
        assert ours == len(evaluations) > 14
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_dopri5_waits_for_the_other_ranks_and_gives_up_on_a_diverging_image():
    answers = iter([True] * 60)
    found = dopri5(
        lambda z, t, y: torch.where(z > 100, torch.nan, z), torch.tensor([1.0, 200.0, 0.5]).reshape(3, 1, 1, 1),
        torch.zeros(3), start=0.0, end=1.0, atol=1e-6, rtol=1e-6, anyone=lambda here: next(answers, here),
    )  # fmt: skip
    assert next(answers, None) is None  # evaluated on while another rank had images left
    assert torch.isnan(found[1]).all()
    torch.testing.assert_close(found[[0, 2], 0, 0, 0], torch.tensor([math.e, math.e / 2]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5", "sde", "ddpm", "ddim"])
def test_samples_depend_neither_on_batch_size_nor_on_ranks(sampler):
    from entprune_ds.evaluation.generate import generate

    process = "dit" if sampler.startswith("dd") else "sit"
    model = ModelConfig(process=process, in_channels=1, learn_sigma=True, num_classes=3)
    settings = SampleConfig(
        sampler=sampler, num_steps=4, cfg_scale=1.5, cfg_interval=(0.2, 0.8), ddim_eta=0.7, sde_diffusion="linear"
    )

    def net(z: Tensor, t: Tensor, y: Tensor) -> Tensor:  # no matrix kernel, so equal to the bit in any batch
        velocity = (y + 1).reshape(-1, 1, 1, 1) * torch.tanh(z) - t.reshape(-1, 1, 1, 1) / 1000
        return velocity if process == "sit" else torch.cat([velocity, 0.1 * z], 1)

    draw = build_sampler(model, DiffusionConfig(), settings)
    labels, keys = torch.arange(10) % 3, dict(shape=(1, 2, 2), seed=4)

    def sample(noise: Tensor, y: Tensor, noise_at) -> Tensor:
        return draw(net, noise, y, noise_at).tanh()

    whole = generate(sample, labels, batch_size=10, **keys)
    for batch_size in (1, 4):
        assert (generate(sample, labels, batch_size=batch_size, **keys) == whole).all()
    for rank in range(2):
        part = generate(sample, labels[rank::2], batch_size=3, slots=range(rank, 10, 2), **keys)
        assert (part == whole[rank::2]).all()


def test_the_model_is_told_original_timesteps_and_its_noise_is_fresh_in_every_step():
    seen, asked = [], []

    def net(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t[0].item())
        return torch.cat([z, z], 1)

    def noise_at(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 1, 1, 1)

    model = ModelConfig(process="dit", in_channels=1, learn_sigma=True)
    draw = build_sampler(model, DiffusionConfig(), SampleConfig(sampler="ddpm", num_steps=250))
    draw(net, torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), noise_at)
    assert seen == [float(t) for t in reversed(space_timesteps(250))] and asked == list(range(249))
