"""NTK and ZiCo as a check uses them: the draws they see, the model they see, their precision, and their errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig, PruneConfig, ScoreConfig, TrainConfig
from entprune_ds.coordinator import History, measure_candidate, proxy_draws, run_check
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.importance.ntk import ntk_gram
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.walk import backward_walk
from entprune_ds.importance.zico import zico_score
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.vote import Candidate, vote
from tests.ranks import run_ranks
from tests.reference import gradients
from tests.reference.scoring_job import projection
from tests.reference.toys import CountingParts, draws, mean_squared, random_dit

FRESH = History()
SMALL = PruneConfig(ntk_samples=6, ntk_repeats=3, zico_batches=4, zico_batch_size=2)


class SpyParts(ModuleParts):
    """Remembers what the model is asked about."""

    def __init__(self, model, dtype=None):
        super().__init__(model, dtype)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((z_t.clone(), t.clone(), labels.clone()))
        return super().embed(z_t, t, labels)


def examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
    """Latents (count,1,4,4) and their true labels; never the null label, 3."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 3


def test_both_proxies_see_noised_latents_true_labels_and_the_same_draws_at_every_depth():
    model = random_dit(depth=4)
    config = Config(prune=SMALL)
    objective = build_objective(replace(config.model, in_channels=1, input_size=4, num_classes=3), config.diffusion)
    fixed = proxy_draws(objective, SMALL, 7, 0, examples)
    seen = []
    for kept in ((0, 1, 2, 3), (0, 2, 3), (2,)):
        parts = SpyParts(model)
        measure_candidate(parts, kept, fixed, objective, SMALL, 7, 0)
        seen.append(parts.seen)
    latents, labels = examples("", 26)
    z_t, t, y = (torch.cat([call[i] for call in seen[0]]) for i in range(3))
    assert [len(call[0]) for call in seen[0]] == [6, 6, 6, 8]  # NTK repeats of N = 6, then the ZiCo batches at once
    assert torch.equal(y, labels)  # no dropout to the null label
    noise = (z_t - t.view(-1, 1, 1, 1) * latents) / (1 - t.view(-1, 1, 1, 1))  # z_t = t data + (1 - t) noise
    assert (z_t - latents).abs().mean() > 0.1 and abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2
    assert len(set(t.tolist())) == len(t)  # every sample has a t of its own
    for other in seen[1:]:
        assert all(
            torch.equal(a, b)
            for mine, theirs in zip(seen[0], other, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
    again = proxy_draws(objective, SMALL, 7, 1, examples)
    assert not torch.equal(again.ntk[0].z_t, fixed.ntk[0].z_t)  # another check draws anew


def test_defaults_are_enough_samples_repeats_and_batches():
    prune = PruneConfig()
    assert prune.ntk_samples >= 16 and prune.ntk_repeats >= 3 and prune.zico_batches >= 8
    assert prune.vote_weights == (1, 1, 0)


def test_a_candidate_is_the_model_of_its_blocks_alone():
    """Block 1 is not 10: the gradients of a candidate are those of a model that has no other block."""
    whole = random_dit(kept_blocks=(1, 2, 10, 11), depth=12)
    z_t, t, labels, _ = draws(whole, 5)
    vector = projection(0, (1, 4, 4))
    for kept in ((1, 2), (1, 10)):
        alone = random_dit(kept_blocks=kept, depth=12)
        alone.load_state_dict({k: v for k, v in whole.state_dict().items() if k in alone.state_dict()})
        gram = ntk_gram(ModuleParts(whole), kept, z_t, t, labels, lambda p: vector.expand_as(p))
        reference = gradients.ntk_gram(alone, z_t, t, labels, vector)
        assert (gram - reference).abs().max() / reference.abs().max() <= 1e-10
        score = zico_score(ModuleParts(whole), kept, lambda b: draws(whole, 4, step=b), mean_squared, 5)
        layers = gradients.zico_layers(alone, [draws(whole, 4, step=b) for b in range(5)])
        assert math.isclose(score.total, sum(layers), rel_tol=1e-10) and len(layers) == 10


def test_single_precision_agrees_with_the_reference():
    model = random_dit(depth=3)
    z_t, t, labels, _ = draws(model, 16)
    vector = projection(0, (1, 4, 4))
    gram = ntk_gram(ModuleParts(model, torch.float32), [0, 1, 2], z_t, t, labels, lambda p: vector.to(p).expand_as(p))
    reference = gradients.ntk_gram(model, z_t, t, labels, vector)
    assert (gram - reference).abs().max() / reference.abs().max() <= 1e-5
    batches = [draws(model, 8, step=b) for b in range(8)]
    score = zico_score(ModuleParts(model, torch.float32), [0, 1, 2], lambda b: batches[b], mean_squared, 8)
    assert math.isclose(score.mean, sum(gradients.zico_layers(model, batches)) / 15, rel_tol=1e-5)


def test_the_conditioning_carries_a_third_of_the_gradients():
    model = random_dit(depth=2)
    z_t, t, labels, _ = draws(model, 4)
    for _, records in backward_walk(ModuleParts(model), [0, 1], z_t, t, labels, torch.ones_like):
        assert records["adaLN_modulation.1"].gradient.abs().max() > 0
        weights = {name: record.module.weight.numel() for name, record in records.items()}
        assert weights["adaLN_modulation.1"] == max(weights.values())


def test_zico_votes_by_its_mean_because_the_sum_favours_depth():
    deep = Candidate(depth=4, kept_blocks=(0, 1, 2, 3), ntk=1.0, zico_mean=2.0, zico_sum=40.0)
    shallow = Candidate(depth=2, kept_blocks=(0, 1), ntk=1.0, zico_mean=3.0, zico_sum=30.0)
    assert vote([deep, shallow], (0.0, 1.0, 0.0), 0.0).chosen.depth == 2


def test_three_ranks_share_whole_batches_and_repeats_and_agree_with_the_reference():
    ranks = run_ranks("tests.workers.proxies:shares", world_size=3, timeout=200)
    assert [r["drawn"]["zico"] for r in ranks] == [[0, 3], [1, 4], [2, 4]]  # batch b on rank b mod 3; 4 is padding
    assert [r["drawn"]["few"] for r in ranks] == [[0], [1], [1]]
    assert [r["drawn"]["ntk"][:2] for r in ranks] == [[0, 3], [1, 3], [2, 3]]
    assert all(r[name] == ranks[0][name] for r in ranks for name in ("zico", "few", "ntk", "problems"))
    model = random_dit(depth=3)
    for name, count in (("zico", 5), ("few", 2)):
        layers = gradients.zico_layers(model, [draws(model, 4, step=b) for b in range(count)])
        assert math.isclose(ranks[0][name], sum(layers), rel_tol=1e-10)
    zico, ntk = ranks[0]["problems"]
    assert "of block 2 is NaN or infinite in ZiCo batch 1. Nothing was removed" in zico
    assert ntk == "NTK repeat 0 of depth 3: block 1 has NaN or infinite activations. Nothing was removed."


@pytest.mark.parametrize("kappa", [None, math.nan])
def test_an_invalid_condition_number_loses_even_alone_against_a_bad_one(kappa):
    good = Candidate(depth=2, kept_blocks=(0, 1), ntk=1e12, zico_mean=1.0, zico_sum=1.0)
    invalid = Candidate(depth=3, kept_blocks=(0, 1, 2), ntk=kappa, zico_mean=1.0, zico_sum=1.0)
    assert vote([good, invalid], (1.0, 0.0, 0.0), 0.01).chosen.depth == 2


def checked(history: History = FRESH, **prune: object) -> tuple[PruneDecision, list[int], list[int]]:
    """A check of a random model on one rank, the blocks that it asked for, and the depths whose time it asked for."""
    model, timed = random_dit(depth=4), []
    small = dict(depth=4, hidden_size=16, num_heads=2, input_size=4, in_channels=1, num_classes=3)
    config = Config(
        model=ModelConfig(**small), prune=replace(SMALL, target_depth=2, num_checks=3, criterion="loss", **prune),
        score=ScoreConfig(draws=8, batch_size=4, sweep="needed"), train=TrainConfig(num_steps=30),
    )  # fmt: skip
    parts = CountingParts(model)

    def step_seconds(kept: tuple[int, ...]) -> float:
        timed.append(len(kept))
        return float(len(kept))

    decision, _ = run_check(parts, (0, 1, 2, 3), config, 1, 10, 4, examples, history=history, step_seconds=step_seconds)
    return decision, parts.requests, timed


def test_the_step_time_is_asked_for_only_where_it_votes():
    decision, _, timed = checked()
    assert timed == [] and {c["step_seconds"] for c in decision.candidates} == {None}
    decision, _, timed = checked(vote_weights=(0.0, 0.0, 1.0))
    assert timed == [4, 3, 2] == [c["step_seconds"] for c in decision.candidates] and decision.chosen_depth == 2


def test_a_check_that_waits_asks_nothing_of_the_model():
    decision, requests, timed = checked(History(last_removal=8), min_steps_between=10, vote_weights=(0.0, 0.0, 1.0))
    assert decision.held and decision.kept_blocks == (0, 1, 2, 3) and decision.scores == {} and decision.order == ()
    assert requests == [] and timed == []


def test_a_check_out_of_reach_of_its_target_is_one_error_of_all_ranks():
    with pytest.raises(comm.DistributedError, match=r"blocks \[0, 1, 2\] are protected.*Nothing was removed"):
        checked(protected_blocks=(0, 1, 2))
