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
from entprune_ds.importance.greedy import greedy_order, greedy_scores
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.ntk import ntk_score
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.scores import Scores, scores_as_json
from entprune_ds.importance.zico import zico_score
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.schedule import blocks_at_depth, blocks_per_check, candidate_depths
from entprune_ds.pruning.vote import Candidate, vote
from entprune_ds.rng import generator_for

Examples = Callable[[str, int], tuple[Tensor, Tensor]]
"""examples(purpose, count) -> the next latents (count,C,H,W) and labels (count,) of a purpose, equal on all ranks."""


@dataclass(frozen=True)
class CheckTimes:
    """Seconds that the parts of a check took on this rank."""

    score: float
    vote: float


def run_check(
    parts: Parts, kept_blocks: tuple[int, ...], config: Config, check: int, step: int, original_depth: int,
    examples: Examples, recut: Callable[[PruneDecision], tuple[int, ...] | None] = lambda decision: None,
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

    Raises:
        DistributedError: on all ranks, when outputs are not finite or the ranks do not agree.
    """
    prune, seed = config.prune, config.run.seed
    start = time.perf_counter()
    target, cap = config.prune.target_depth or 1, blocks_per_check(prune, original_depth)
    if prune.score_only:  # nothing goes, so the last checks would be out of reach of any cap
        cap = max(cap, len(kept_blocks) - target)
    scores, order = rank_blocks(
        measuring(parts, kept_blocks, config, check, examples), min(cap, len(kept_blocks) - target)
    )
    swept = time.perf_counter()
    depths = candidate_depths(len(kept_blocks), target, cap, prune.num_checks - check)
    objective = build_objective(config.model, config.diffusion)
    draws = proxy_draws(objective, prune, seed, check, examples)
    keep_sets = [tuple(blocks_at_depth(kept_blocks, order, depth)) for depth in depths]
    candidates = [measure_candidate(parts, kept, draws, objective, prune, seed, check) for kept in keep_sets]
    proposal = _decide(candidates, prune, check, step, kept_blocks, order, scores) if comm.is_main() else None
    fault_points.reach("broadcast")
    decision = PruneDecision.from_json(comm.broadcast_json(None if proposal is None else proposal.to_json()))
    if not decision.score_only:
        decision = replace(decision, cut=recut(decision))
    comm.assert_same_on_all_ranks(decision.digest, "the pruning decision")
    return decision, CheckTimes(swept - start, time.perf_counter() - swept)


def rank_blocks(m: Measuring, removals: int) -> tuple[Scores, list[int]]:
    """Scores of the check, and the present blocks in the order of removal, by score.mode. Collective.

    Args:
        m: the check.
        removals: most blocks that it may remove: as often does greedy score.
    """
    prune = m.config.prune

    def agreed(m: Measuring) -> Scores:
        scores = measure(m)
        comm.assert_same_on_all_ranks(scores_as_json(scores), "the block scores")
        return scores

    def order(scores: Scores, kept_blocks: tuple[int, ...]) -> list[int]:
        return removal_order(
            prune.criterion, scores, kept_blocks, target_depth=prune.target_depth or 1, seed=m.config.run.seed,
            check=m.check, explicit_order=prune.explicit_order,
        )  # fmt: skip

    greedy = m.config.score.mode == "greedy"
    scores = greedy_scores(m, agreed, order, removals) if greedy else agreed(m)
    return scores, greedy_order(scores, prune.criterion, m.kept_blocks, order)


def measure(m: Measuring) -> Scores:
    """What the criterion needs, and the sweep for the record unless score.sweep=needed. Collective."""
    criterion = find_criterion(m.config.prune.criterion)
    scores: Scores = {}
    if m.config.score.sweep == "always" or criterion.needs_sweep:
        scores |= measure_sweep(m, entropy_needed=criterion.needs_entropy)
    if criterion.measure is not None:
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


def _decide(
    candidates: list[Candidate], prune: PruneConfig, check: int, step: int, kept_blocks: tuple[int, ...],
    order: list[int], scores: Scores,
) -> PruneDecision:  # fmt: skip
    """Rank 0: the vote, written down as a value."""
    outcome = vote(candidates, prune.vote_weights, prune.vote_tolerance)
    chosen = outcome.chosen
    forced = candidates[0].depth < len(kept_blocks)
    dropped = tuple(b for b in kept_blocks if b not in chosen.kept_blocks)
    return PruneDecision(
        check=check, step=step, criterion=prune.criterion, kept_before=kept_blocks, dropped=dropped,
        kept_blocks=chosen.kept_blocks, order=tuple(order), scores=scores_as_json(scores),  # type: ignore[arg-type]
        candidates=outcome.as_json(), chosen_depth=chosen.depth, forced=forced,
        reason=_reason(len(kept_blocks), chosen.depth, candidates, outcome.tied_depths, prune, check),
        score_only=prune.score_only,
    )  # fmt: skip


def _reason(
    depth: int, chosen: int, candidates: list[Candidate], equal: list[int], prune: PruneConfig, check: int
) -> str:
    if len(candidates) == 1:
        last = check == prune.num_checks - 1
        why = "the last check reaches the target" if last else "only this depth leaves the target within reach"
        return f"{depth} -> {chosen}: {why}."
    at_least = depth - candidates[0].depth
    floor = f"; at least {at_least} had to go" if at_least else ""
    depths = [c.depth for c in candidates]
    tied = f"; depths {equal} tie and the deepest wins" if len(equal) > 1 else ""
    return f"{depth} -> {chosen}: lowest weighted sum of the NTK and ZiCo ranks among depths {depths}{tied}{floor}."
