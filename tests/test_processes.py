"""The formulas of both processes against slow float64 versions: paths, predictions, losses, chain, guidance."""

from __future__ import annotations

import math

import pytest
import torch

from entprune_ds.config import DiffusionConfig, ModelConfig, SampleConfig
from entprune_ds.diffusion.ddpm import chain, noised, space_timesteps
from entprune_ds.diffusion.guidance import with_guidance
from entprune_ds.diffusion.interpolant import PATHS, sampling_range, sde_range, training_range
from entprune_ds.diffusion.objective import DiffusionObjective, FlowObjective, build_objective
from entprune_ds.diffusion.prediction import PREDICTIONS, score_of, velocity_of
from entprune_ds.diffusion.sampling import build_sampler, sampling_protocol
from entprune_ds.diffusion.sde import diffusion_coefficient
from tests.reference import processes

SHAPE = (2, 2, 2)
TIMES = (1e-3, 0.1, 0.5, 0.83, 1 - 1e-3)
FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- flow


@pytest.mark.parametrize("path", PATHS)
def test_paths_and_their_derivatives_are_the_formulas(path):
    found = PATHS[path].at(torch.tensor(TIMES, dtype=torch.float64))
    for i, t in enumerate(TIMES):
        a, s, da, ds = processes.coefficients(path, t)
        got = [getattr(found, key)[i].item() for key in ("alpha", "sigma", "d_alpha", "d_sigma", "growth")]
        assert got == pytest.approx([a, s, da, ds, da / a], rel=1e-9)
        assert found.score_factor[i].item() == pytest.approx(processes.score_factor(path, t), rel=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_goes_from_noise_to_data(path):
    ends = PATHS[path].at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    nearly = 0.0066 if path == "vp" else 0.0  # the VP path keeps a little of the data at t = 0
    torch.testing.assert_close(ends.alpha, torch.tensor([nearly, 1.0], dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(ends.sigma, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_vp_path_keeps_its_digits_near_the_data_in_single_precision():
    t = torch.tensor([1 - 1e-5], dtype=torch.float32)
    exact = PATHS["vp"].at(t.double()).sigma.item()
    assert PATHS["vp"].at(t).sigma.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_true_predictions_become_the_true_velocity_and_score(path, kind):
    data, noise = normal(len(TIMES), *SHAPE, seed=1), normal(len(TIMES), *SHAPE, seed=2)
    t = torch.tensor(TIMES, dtype=torch.float64)
    z_t, velocity = PATHS[path].mix(data, noise, t)
    c = PATHS[path].at(t.reshape(-1, 1, 1, 1))
    prediction = {"velocity": velocity, "score": -noise / c.sigma, "noise": noise}[kind]
    torch.testing.assert_close(velocity_of(kind, c, z_t, prediction), velocity, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(score_of(kind, c, z_t, prediction), -noise / c.sigma, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_a_velocity_gives_a_finite_score_where_there_is_no_data(path):
    z, c = normal(3, *SHAPE), PATHS[path].at(torch.zeros(3, 1, 1, 1, dtype=torch.float64))
    score = score_of("velocity", c, z, c.d_sigma * z)  # at t = 0 z is the noise
    torch.testing.assert_close(score, -z, rtol=0, atol=5e-2 if path == "vp" else 1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_diffusion_coefficients_are_the_published_forms(path, form):
    t = torch.tensor(TIMES, dtype=torch.float64)
    found = diffusion_coefficient(form, 1.7, PATHS[path].at(t), t)
    assert found.tolist() == pytest.approx([processes.diffusion(path, form, 1.7, v) for v in TIMES], rel=1e-9)
    assert (found >= 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
def test_flow_draws_and_losses_are_the_formulas(path, kind, weight):
    objective = build_objective(ModelConfig(), DiffusionConfig(path=path, prediction=kind, loss_weight=weight))
    assert objective == FlowObjective(path, kind, weight)
    latents = normal(6, *SHAPE, seed=3).float()
    made = objective.make_draws(latents, torch.zeros(6, dtype=torch.int64), range(6), seed=1, purpose="train", step=2)
    plain = FlowObjective().make_draws(latents, made.labels, range(6), seed=1, purpose="train", step=2)
    noise, output = latents - plain.target, normal(6, *SHAPE, seed=4)  # the same streams, whatever the objective
    loss = objective.loss(output, made.target.double(), made.t.double())
    for n in range(6):
        t, data, e = made.t[n].double().item(), latents[n].double(), noise[n].double()
        a, s, _, _ = processes.coefficients(path, t)
        torch.testing.assert_close(made.z_t[n].double(), a * data + s * e, rtol=0, atol=1e-5)
        assert loss[n].item() == pytest.approx(
            processes.flow_loss(path, kind, weight, output[n], data, e, t), rel=2e-4 if kind == "velocity" else 1e-5
        )
    assert torch.equal(loss, objective.scoring_loss(output, made.target.double(), made.t.double()))


def test_singular_ends_are_left_out_as_in_the_official_code():
    assert [training_range(p, "velocity") for p in PATHS] == [(0, 1), (0, 1), (0, 1 - 1e-5)]
    assert [training_range(p, "noise") for p in PATHS] == [(1e-3, 1 - 1e-3)] * 2 + [(0, 1 - 1e-5)]
    assert [sampling_range(p, "velocity") for p in PATHS] == [(0, 1), (0, 1), (0, 1 - 1e-3)]
    assert [sampling_range(p, "score") for p in PATHS] == [(1e-3, 1 - 1e-3)] * 2 + [(0, 1 - 1e-3)]
    assert sde_range("linear", "velocity", "sigma", 0.04) == (0, 0.96) and sde_range("vp", "score", "sbdm", 0.04) == (
        0,
        0.96,
    )
    assert sde_range("linear", "velocity", "sbdm", 0.0) == (1e-3, 1) and sde_range("gvp", "noise", "sigma", 0.0) == (
        1e-3,
        1 - 1e-3,
    )


# ---------------------------------------------------------------- diffusion


def test_timesteps_are_respaced_by_the_official_rule():
    assert space_timesteps(1000) == tuple(range(1000))
    assert space_timesteps(5) == (0, 250, 500, 749, 999)  # halves go to the even number
    two_fifty = space_timesteps(250)
    assert len(set(two_fifty)) == 250 and two_fifty[:4] == (0, 4, 8, 12) and two_fifty[-1] == 999
    for count in (0, 1, 1001):
        with pytest.raises(ValueError, match="2 to 1000"):
            space_timesteps(count)


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_the_chain_is_the_slow_one(count):
    timesteps = list(space_timesteps(count))
    table, betas = chain(tuple(timesteps)), processes.betas(timesteps)
    for k in {0, 1, count // 2, count - 1}:
        bar = processes.alpha_bar(timesteps[k])
        assert table.timesteps[k] == timesteps[k]
        assert table.alpha_bar[k].item() == pytest.approx(bar, rel=1e-12)
        assert table.noise_ratio[k].item() == pytest.approx(math.sqrt((1 - bar) / bar), rel=1e-10)
        assert table.log_beta[k].item() == pytest.approx(math.log(betas[k]), rel=1e-9)
        by_data, variance = processes.posterior(timesteps, k, 1.0, 0.0)
        by_z = processes.posterior(timesteps, k, 0.0, 1.0)[0]
        assert table.data_factor[k].item() == pytest.approx(by_data, rel=1e-8)
        assert table.z_factor[k].item() == pytest.approx(by_z, rel=1e-8, abs=1e-12)
        if k:
            assert table.log_posterior[k].item() == pytest.approx(math.log(variance), rel=1e-8)
    assert table.log_posterior[0] == table.log_posterior[1] and table.alpha_bar_prev[0] == 1


def test_the_diffusion_loss_is_the_formula_at_every_kind_of_timestep():
    timesteps = [0, 0, 1, 500, 999]
    data = normal(5, *SHAPE, seed=1) * 0.5
    data[0, 0, 0] = torch.tensor([1.0, -1.0])  # the open bins
    noise, epsilon = normal(5, *SHAPE, seed=2), normal(5, *SHAPE, seed=3)
    epsilon[:2] = noise[:2] + 0.3 * epsilon[:2]
    logits, t = 0.7 * normal(5, *SHAPE, seed=4), torch.tensor(timesteps, dtype=torch.float64)
    objective = build_objective(ModelConfig(process="dit", in_channels=2, learn_sigma=True), DiffusionConfig())
    found = objective.loss(torch.cat([epsilon, logits], 1), torch.cat([noise, data], 1), t)
    for n, timestep in enumerate(timesteps):
        columns = [x[n].flatten().tolist() for x in (epsilon, logits, noise, data)]
        elements = list(zip(*columns, strict=True))
        expected = sum((e - x) ** 2 for e, _, x, _ in elements) / 8
        expected += sum(processes.variational_bits(*element, timestep) for element in elements) / 8
        assert found[n].item() == pytest.approx(expected, rel=1e-8)
    scored = objective.scoring_loss(epsilon, torch.cat([noise, data], 1), t)
    torch.testing.assert_close(scored, (epsilon - noise).square().flatten(1).mean(1))


def test_the_variational_term_trains_the_variance_alone():
    objective, noise, data = DiffusionObjective(2), normal(4, *SHAPE, seed=2), normal(4, *SHAPE, seed=1)
    prediction = normal(4, 4, 2, 2, seed=3).requires_grad_()
    target = torch.cat([noise, data], 1)
    objective.loss(prediction, target, torch.tensor([0.0, 3.0, 500.0, 999.0])).sum().backward()
    torch.testing.assert_close(prediction.grad[:, :2], 2 * (prediction.detach()[:, :2] - noise) / 8)
    assert torch.isfinite(prediction.grad).all() and (prediction.grad[:, 2:] != 0).any(3).any(2).any(1).all()


def test_the_right_variance_minimises_the_variational_term():
    objective, logits = DiffusionObjective(1), torch.linspace(-1, 1, 41, dtype=torch.float64)
    noise, data = normal(1, 1, 64, 64, seed=2).expand(41, -1, -1, -1), torch.zeros(41, 1, 64, 64, dtype=torch.float64)
    prediction = torch.cat([noise, logits.reshape(-1, 1, 1, 1).expand_as(noise)], 1)  # noise known: the posterior's
    loss = objective.loss(prediction, torch.cat([noise, data], 1), torch.full((41,), 300.0))
    assert loss.argmin() == 0 and loss[0].abs() < 1e-12 and loss[-1] > 0


def test_diffusion_draws_hold_noise_and_data_at_uniform_timesteps():
    count = 4000
    latents, labels = normal(count, *SHAPE, seed=1).float(), torch.arange(count) % 10
    made = DiffusionObjective(2).make_draws(
        latents, labels, range(count), seed=0, purpose="train", step=0, label_dropout=0.3, null_label=10
    )
    noise, data = made.target.chunk(2, dim=1)
    assert torch.equal(data, latents) and made.t.dtype == torch.float32
    assert torch.equal(made.t, made.t.floor()) and made.t.min() >= 0 and made.t.max() <= 999
    assert (torch.histc(made.t, 10, 0, 1000) - 400).abs().max() < 4 * math.sqrt(360)
    for n in range(5):
        bar = processes.alpha_bar(int(made.t[n]))
        expected = math.sqrt(bar) * data[n] + math.sqrt(1 - bar) * noise[n]
        torch.testing.assert_close(made.z_t[n], expected, rtol=0, atol=1e-6)
    flow = FlowObjective().make_draws(
        latents, labels, range(count), seed=0, purpose="train", step=0, label_dropout=0.3, null_label=10
    )
    assert torch.equal(flow.labels, made.labels) and torch.equal(latents - flow.target, latents - (latents - noise))
    assert [len(p.target) for p in made.split(1500)] == [1500, 1500, 1000]
    assert noised(latents[:1], noise[:1], torch.tensor([0])).dtype == torch.float32


# ---------------------------------------------------------------- guidance


def by_label(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A model of four channels whose prediction is label + channel."""
    return y.reshape(-1, 1, 1, 1) + torch.arange(4.0).reshape(1, 4, 1, 1) + 0 * z[:, :1]


def test_unguided_channels_keep_the_prediction_for_the_label():
    z, t, labels = torch.zeros(2, 4, 1, 1), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    found = with_guidance(by_label, 3.0, 10, channels=3)(z, t, labels)[:, :, 0, 0]
    assert found.tolist() == [[10 + c + 3 * (label - 10) for c in range(3)] + [label + 3] for label in (1, 2)]


def test_guidance_acts_in_its_interval_alone_and_costs_nothing_outside():
    sizes = []

    def model(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        return by_label(z, t, y)

    guided = with_guidance(model, 3.0, 10, interval=(0.2, 0.6))
    z, labels = torch.zeros(4, 4, 1, 1), torch.tensor([1, 2, 3, 4])
    found = guided(z, torch.tensor([0.1, 0.2, 0.6, 0.61]), labels)[:, 0, 0, 0]
    assert found.tolist() == [1, 10 - 24, 10 - 21, 4] and sizes == [8]
    assert guided(z, torch.full((4,), 0.9), labels)[:, 0, 0, 0].tolist() == [1, 2, 3, 4] and sizes == [8, 4]


@pytest.mark.parametrize("process", ["sit", "dit"])
def test_the_interval_runs_from_noise_to_data_in_both_processes(process):
    guided_at = []

    def model(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        guided_at.append((t[0].item(), len(z) == 2))
        return torch.cat([z, z], 1) if process == "dit" else z

    config = ModelConfig(process=process, in_channels=1, learn_sigma=True)
    sampler = {"sit": "euler", "dit": "ddim"}[process]
    settings = SampleConfig(sampler=sampler, num_steps=10, cfg_scale=2.0, cfg_interval=(0.5, 1.0))
    draw = build_sampler(config, DiffusionConfig(), settings)
    draw(model, torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), lambda step: torch.zeros(1, 1, 1, 1))
    assert [guided for _, guided in guided_at] == [False] * 5 + [True] * 5
    assert guided_at[0][0] == (0 if process == "sit" else 999)


@pytest.mark.parametrize(("channels", "expected"), [(None, [True, True, False, False]), (1, [True] + [False] * 3)])
def test_the_variance_of_dit_is_never_guided(channels, expected):
    seen = []

    def model(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z).repeat(1, 2, 1, 1) + y.reshape(-1, 1, 1, 1)

    import entprune_ds.diffusion.sampling as sampling

    config = ModelConfig(process="dit", in_channels=2, learn_sigma=True, num_classes=5)
    settings = SampleConfig(sampler="ddim", num_steps=2, cfg_scale=2.0, cfg_channels=channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampling, "ddim", lambda net, noise, labels, *_, **__: seen.append(net(noise, noise[:, 0, 0, 0], labels))
        )
        draw = sampling.build_sampler(config, DiffusionConfig(), settings)
        draw(model, torch.zeros(1, 2, 1, 1), torch.ones(1, dtype=torch.int64), lambda step: torch.zeros(1))
    [prediction] = seen
    assert [v == 5 + 2 * (1 - 5) for v in prediction[0, :, 0, 0].tolist()] == expected


def test_the_protocol_names_every_setting_that_matters_and_no_other():
    flow, dit = ModelConfig(), ModelConfig(process="dit", learn_sigma=True)
    plain = sampling_protocol(flow, DiffusionConfig(), SampleConfig())
    assert plain == dict(
        process="sit", sampler="euler", cfg_scale=1.0, num_steps=25, path="linear", prediction="velocity"
    )
    sde = sampling_protocol(
        flow, DiffusionConfig(path="gvp"), SampleConfig(sampler="sde", cfg_scale=1.5, cfg_channels=3)
    )
    wanted = dict(sde_diffusion="sigma", sde_norm=1.0, sde_last_step="mean", sde_last_step_size=0.04, path="gvp")
    assert sde.items() >= (wanted | dict(cfg_channels=3)).items() and sde["cfg_interval"] == [0.0, 1.0]
    assert sampling_protocol(dit, DiffusionConfig(), SampleConfig(sampler="ddim"))["ddim_eta"] == 0.0
    assert "num_steps" not in sampling_protocol(flow, DiffusionConfig(), SampleConfig(sampler="dopri5"))


@pytest.mark.parametrize(("process", "sampler"), [("dit", "euler"), ("sit", "ddpm"), ("sit", "rk4")])
def test_a_sampler_of_the_other_process_is_refused(process, sampler):
    with pytest.raises(ValueError, match=f"got {sampler}"):
        build_sampler(ModelConfig(process=process), DiffusionConfig(), SampleConfig(sampler=sampler))
