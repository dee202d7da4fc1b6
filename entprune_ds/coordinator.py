"""One pruning check: gather the scores of all ranks, decide on rank 0, and make sure that all ranks agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entprune_ds import comm, fault_points
from entprune_ds.config import Config, PruneConfig
from entprune_ds.diffusion.objective import Draws, Objective, build_objective
from entprune_ds.importance.ntk import ntk_score
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.scores import scores_as_json
from entprune_ds.importance.zico import zico_score
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.policy import open_depths, propose, state_of
from entprune_ds.pruning.schedule import blocks_at_depth
from entprune_ds.pruning.trend import Validation
from entprune_ds.pruning.vote import Candidate
from entprune_ds.ranking import Examples, HoldRace, Ranking, measure, measuring, rank_blocks
from entprune_ds.rng import generator_for


@dataclass(frozen=True)
class History:
    """What the run has gone through, as far as a check looks at it."""

    last_removal: int | None = None
    """Step of the last removal; None before any."""
    validations: tuple[Validation, ...] = ()
    """Validation losses, in order."""


@dataclass(frozen=True)
class CheckTimes:
    """Seconds that the parts of a check took on this rank."""

    score: float
    vote: float
    race: float = 0.0


def run_check(
    parts: Parts, kept_blocks: tuple[int, ...], config: Config, check: int, step: int, original_depth: int,
    examples: Examples, recut: Callable[[PruneDecision], tuple[int, ...] | None] = lambda decision: None,
    hold_race: HoldRace | None = None, history: History = History(),
    step_seconds: Callable[[tuple[int, ...]], float] | None = None,
) -> tuple[PruneDecision, CheckTimes]:  # fmt: skip
    """Score every block, vote on the depth, and agree on a decision. Collective: all ranks call.

    Nothing of the training is touched: weights are read through `parts`, draws come from rng.py.

    Args:
        parts: the model as it trains now.
        kept_blocks: original indices of its present blocks.
        check: index of this check, 0 .. prune.num_checks - 1.
        step: training step before which it stands.
        original_depth: depth at the start of this run, which the default cap refers to.
        examples: calibration data.
        recut: blocks per pipeline stage for what stays, None without a pipeline; collective.
        hold_race: for a criterion that races; collective.
        history: of the run.
        step_seconds: time of a step with these blocks, equal on all ranks; asked only where it votes; collective.

    Raises:
        ValueError: when the criterion races and nothing is there to train.
        DistributedError: on all ranks, when outputs are not finite, the target is out of reach, or the ranks do not
            agree.
    """
    start = time.perf_counter()
    state = state_of(config, check, step, kept_blocks, original_depth, history.last_removal, history.validations)
    try:
        choice = open_depths(state)
    except ValueError as problem:  # the same on all ranks
        raise comm.DistributedError(str(problem)) from problem
    removable = min(state.cap, state.depth - state.target_depth)
    m = measuring(parts, kept_blocks, config, check, examples, removable)
    if choice.removes_nothing:
        ranking = Ranking(measure(m, for_the_record=True), [], parts)
    else:
        ranking = rank_blocks(m, state, hold_race)
    ranked = time.perf_counter()
    candidates: list[Candidate] = []
    if not choice.removes_nothing:
        objective = build_objective(config.model, config.diffusion)
        draws = proxy_draws(objective, config.prune, config.run.seed, check, examples)
        for kept in [tuple(blocks_at_depth(kept_blocks, ranking.order, depth)) for depth in choice.depths]:
            found = measure_candidate(ranking.parts, kept, draws, objective, config.prune, config.run.seed, check)
            timed = step_seconds(kept) if state.vote_weights[2] and step_seconds is not None else None
            candidates.append(replace(found, step_seconds=timed))
    proposal = None
    if comm.is_main():
        proposal = propose(state, ranking.order, candidates, scores_as_json(ranking.scores))
        proposal = replace(proposal, race=ranking.race)
    fault_points.reach("broadcast")
    decision = PruneDecision.from_json(comm.broadcast_json(None if proposal is None else proposal.to_json()))
    if not decision.score_only:
        decision = replace(decision, cut=recut(decision))
    comm.assert_same_on_all_ranks(decision.digest, "the pruning decision")
    scoring = ranked - start - ranking.race_seconds
    return decision, CheckTimes(scoring, time.perf_counter() - ranked, ranking.race_seconds)


@dataclass(frozen=True)
class ProxyDraws:
    """The fixed draws of the NTK repeats and the ZiCo batches, shared by all candidates of a check."""

    ntk: list[Draws]
    zico: list[Draws]


def proxy_draws(objective: Objective, prune: PruneConfig, seed: int, check: int, examples: Examples) -> ProxyDraws:
    """Draw for both proxies; equal on all ranks."""
    ntk, zico = prune.ntk_samples * prune.ntk_repeats, prune.zico_batch_size * prune.zico_batches
    latents, labels = examples("proxies", ntk + zico)
    draws = objective.make_draws(latents, labels, range(ntk + zico), seed=seed, purpose="proxies", step=check)
    first, rest = draws.split([ntk, zico])
    return ProxyDraws(first.split(prune.ntk_samples), rest.split(prune.zico_batch_size))


def measure_candidate(
    parts: Parts, kept_blocks: tuple[int, ...], draws: ProxyDraws, objective: Objective, prune: PruneConfig, seed: int,
    check: int,
) -> Candidate:  # fmt: skip
    """NTK condition number and ZiCo of the model that keeps these blocks. Collective."""

    def ntk_draw(repeat: int) -> tuple[Tensor, Tensor, Tensor]:
        return draws.ntk[repeat].z_t, draws.ntk[repeat].t, draws.ntk[repeat].labels

    def projection(repeat: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator_for(seed, "ntk/projection", check, repeat))

    def zico_draw(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return draws.zico[batch].z_t, draws.zico[batch].t, draws.zico[batch].labels, draws.zico[batch].target

    ntk = ntk_score(parts, kept_blocks, ntk_draw, projection, prune.ntk_repeats)
    zico = zico_score(parts, kept_blocks, zico_draw, objective.scoring_loss, prune.zico_batches)
    return Candidate(
        depth=len(kept_blocks), kept_blocks=kept_blocks, ntk=ntk.median, zico_mean=zico.mean, zico_sum=zico.total
    )
