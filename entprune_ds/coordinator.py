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
from entprune_ds.importance.criteria import find_criterion, removal_order
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.ntk import ntk_score
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.scores import Scores, scores_as_json
from entprune_ds.importance.zico import zico_score
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.policy import CheckState, open_depths, propose, protected_last, state_of
from entprune_ds.pruning.schedule import blocks_at_depth
from entprune_ds.pruning.trend import Validation
from entprune_ds.pruning.vote import Candidate
from entprune_ds.rng import generator_for

Examples = Callable[[str, int], tuple[Tensor, Tensor]]
"""examples(purpose, count) -> the next latents (count,C,H,W) and labels (count,) of a purpose, equal on all ranks."""


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


def run_check(
    parts: Parts, kept_blocks: tuple[int, ...], config: Config, check: int, step: int, original_depth: int,
    examples: Examples, recut: Callable[[PruneDecision], tuple[int, ...] | None] = lambda decision: None,
    history: History = History(), step_seconds: Callable[[tuple[int, ...]], float] | None = None,
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
        history: of the run.
        step_seconds: time of a step with these blocks, equal on all ranks; asked only where it votes; collective.

    Raises:
        DistributedError: on all ranks, when outputs are not finite, the target is out of reach, or the ranks do not
            agree.
    """
    start = time.perf_counter()
    state = state_of(config, check, step, kept_blocks, original_depth, history.last_removal, history.validations)
    try:
        choice = open_depths(state)
    except ValueError as problem:  # the same on all ranks
        raise comm.DistributedError(str(problem)) from problem
    waits = choice.removes_nothing
    scores = measure(measuring(parts, kept_blocks, config, check, examples), for_the_record=waits)
    comm.assert_same_on_all_ranks(scores_as_json(scores), "the block scores")
    order = [] if waits else order_of(state, scores)
    swept = time.perf_counter()
    candidates: list[Candidate] = []
    if not waits:
        objective = build_objective(config.model, config.diffusion)
        draws = proxy_draws(objective, config.prune, config.run.seed, check, examples)
        keep_sets = [tuple(blocks_at_depth(kept_blocks, order, depth)) for depth in choice.depths]
        for kept in keep_sets:
            found = measure_candidate(parts, kept, draws, objective, config.prune, config.run.seed, check)
            timed = step_seconds(kept) if state.vote_weights[2] and step_seconds is not None else None
            candidates.append(replace(found, step_seconds=timed))
    proposal = propose(state, order, candidates, scores_as_json(scores)) if comm.is_main() else None
    fault_points.reach("broadcast")
    decision = PruneDecision.from_json(comm.broadcast_json(None if proposal is None else proposal.to_json()))
    if not decision.score_only:
        decision = replace(decision, cut=recut(decision))
    comm.assert_same_on_all_ranks(decision.digest, "the pruning decision")
    return decision, CheckTimes(swept - start, time.perf_counter() - swept)


def order_of(state: CheckState, scores: Scores) -> list[int]:
    """The order of removal of a check: that of its criterion, the protected blocks last. Pure."""
    order = removal_order(
        state.criterion, scores, state.kept_blocks, target_depth=state.target_depth, seed=state.seed,
        check=state.check, explicit_order=state.explicit_order,
    )  # fmt: skip
    return protected_last(order, state.protected)


def measure(m: Measuring, for_the_record: bool = False) -> Scores:
    """What the criterion needs, and the sweep for the record unless score.sweep=needed. Collective.

    Args:
        m: the check.
        for_the_record: nothing will be ranked, so that nothing is needed.
    """
    criterion, needed = find_criterion(m.config.prune.criterion), not for_the_record
    scores: Scores = {}
    if m.config.score.sweep == "always" or (needed and criterion.needs_sweep):
        scores |= measure_sweep(m, entropy_needed=needed and criterion.needs_entropy)
    if needed and criterion.measure is not None:
        scores |= criterion.measure(m)
    return scores


def measuring(parts: Parts, kept_blocks: tuple[int, ...], config: Config, check: int, examples: Examples) -> Measuring:
    """A check as criteria see it: draws of this check's own random streams."""
    objective = build_objective(config.model, config.diffusion)
    taken: dict[str, int] = {}

    def draw(purpose: str, count: int) -> Batch:
        first = taken.get(purpose, 0)
        taken[purpose] = first + count
        latents, labels = examples(purpose, count)
        slots = range(first, first + count)
        draws = objective.make_draws(latents, labels, slots, seed=config.run.seed, purpose=purpose, step=check)
        return Batch(draws.z_t, draws.t, draws.labels, draws.target)

    return Measuring(
        parts=parts, kept_blocks=kept_blocks, config=config, check=check, draw=draw, loss_fn=objective.scoring_loss
    )


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
    first, rest = (
        Draws(*columns) for columns in zip(*(c.split([ntk, zico]) for c in vars(draws).values()), strict=True)
    )
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
