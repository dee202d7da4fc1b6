"""Soft pruning while a run trains: score, move the mask, and at some updates remove for good what it has closed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.coordinator import Examples, measuring
from entprune_ds.engine.build import Engine
from entprune_ds.engine.gates import fold_gates, set_gates
from entprune_ds.engine.resize import next_cut
from entprune_ds.engine.view import ShardedView
from entprune_ds.importance.gradient_flow import GradientFlow, gradient_draws, gradient_flow
from entprune_ds.macs import blocks_macs, unit_macs
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.soft_mask import (
    Costs,
    Mask,
    Removal,
    SoftState,
    both,
    choose,
    masked_macs,
    open_mask,
    raised,
    standardised,
    updated,
)
from entprune_ds.pruning.surgery import narrowed
from entprune_ds.soft_budget import budget, removal_steps, target_share, update_steps


@dataclass(frozen=True)
class SoftUpdate:
    """What one update has done."""

    decision: PruneDecision | None
    """At a removal."""
    metrics: dict[str, float]


def open_soft(config: Config, engine: Engine, saved: dict[str, Any] | None) -> SoftState | None:
    """The mask of a checkpoint, with its gates in the engine, or one that is open; None when soft pruning is off."""
    if not config.soft.every:
        return None
    if saved is None:
        widths = {b: engine.model_config.widths(b) for b in engine.kept_blocks}
        return open_mask(widths, config.soft.units, config.protected_blocks)
    soft = SoftState.from_json(saved)
    set_gates(engine, soft.gates())
    return soft


def soft_due(config: Config, soft: SoftState | None, step: int) -> bool:
    """Whether an update stands before this step and has not been made."""
    return soft is not None and step in update_steps(config) and soft.step < step


def soft_update(engine: Engine, config: Config, soft: SoftState, step: int, examples: Examples) -> SoftUpdate:
    """Score all units, move the mask, set the gates; at a removal also fold them and say what goes. Collective.

    Rank 0 decides, and every rank checks that it has the same mask and decision.

    Raises:
        DistributedError: on all ranks, when outputs are not finite, there is no gradient, or the ranks do not agree.
    """
    start, model = time.perf_counter(), engine.model_config
    found = score_units(engine, config, soft.updates, step, examples)
    costs, allowed = costs_of(config.model, model), budget(config, step)
    scores = standardised(both(_of_kinds(found.rise, soft.mask), soft.folded, torch.div))  # by m, not by the gate
    moved = updated(soft.mask, scores, costs, allowed, config.soft.budget_weight, config.soft.eta)
    soft.mask, soft.step, soft.updates = _from_rank_0(moved), step, soft.updates + 1
    comm.assert_same_on_all_ranks(soft.to_json(), "the mask of soft pruning")
    set_gates(engine, soft.gates())
    metrics = {
        "prune/soft_macs": float(masked_macs(soft.mask, costs)), "prune/soft_budget": allowed,
        "prune/soft_gradient_norm_squared": found.norm_squared, "prune/score_seconds": time.perf_counter() - start,
    }  # fmt: skip
    removals = removal_steps(config)
    if step not in removals:
        return SoftUpdate(None, metrics)
    final = step == removals[-1]
    removal = choose(soft.mask, scores, costs, target_share(config), config.soft.threshold, final)
    decision = _agreed(engine, config, _proposal(engine, config, soft, found, removal, removals.index(step), final))
    if decision.removes or final:
        soft.mask = raised(soft.mask, decision.kept_blocks, decision.narrow, config.soft.threshold)
        set_gates(engine, soft.gates())
        fold_gates(engine)
        soft.shrink(decision.kept_blocks, decision.narrow)
        soft.fold()
    return SoftUpdate(decision, metrics)


def score_units(engine: Engine, config: Config, update: int, step: int, examples: Examples) -> GradientFlow:
    """Gradient-flow scores of every gate of the model as it trains now. Collective."""
    parts = ShardedView(engine, "weight", getattr(torch, config.score.dtype))
    m = measuring(parts, engine.kept_blocks, config, update, examples)
    try:
        return gradient_flow(parts, engine.kept_blocks, gradient_draws(m), config.score.gradient_draws, m.loss_fn)
    except ValueError as problem:  # the same on all ranks
        raise comm.DistributedError(f"soft pruning at step {step}: {problem} Nothing was removed.") from problem


def costs_of(start: ModelConfig, now: ModelConfig) -> Costs:
    """Costs of the present units as shares of the blocks at the start of the run."""
    units, whole = unit_macs(start), blocks_macs(start)
    widths = {b: now.widths(b) for b in now.blocks}
    return Costs(units.head / whole, units.channel / whole, units.rest / whole, widths)


def _of_kinds(scores: dict[int, dict[str, Tensor]], mask: Mask) -> Mask:
    """The scores of the units that the mask has."""
    return {b: {kind: scores[b][kind].reshape(m.shape) for kind, m in of_block.items()} for b, of_block in mask.items()}


def _from_rank_0(mask: Mask) -> Mask:
    """The values of rank 0; exact, for all others add 0. Collective."""
    flat = torch.cat([m.reshape(-1) for of_block in mask.values() for m in of_block.values()])
    flat = comm.all_reduce_sum((flat if comm.is_main() else torch.zeros_like(flat)).to(comm.device())).cpu()
    sizes = [m.numel() for of_block in mask.values() for m in of_block.values()]
    parts = iter(flat.split(sizes))
    return {b: {kind: next(parts).view_as(m).clone() for kind, m in of_block.items()} for b, of_block in mask.items()}


def _agreed(engine: Engine, config: Config, proposal: PruneDecision) -> PruneDecision:
    """Rank 0's word, with the cut of the pipeline, the same on all ranks. Collective."""
    decision = PruneDecision.from_json(comm.broadcast_json(proposal.to_json()))
    model = narrowed(engine.model_config, decision.kept_blocks, decision.narrow)
    decision = replace(decision, cut=next_cut(engine, config, model))
    comm.assert_same_on_all_ranks(decision.digest, "the pruning decision")
    return decision


def _proposal(
    engine: Engine, config: Config, soft: SoftState, found: GradientFlow, removal: Removal, number: int, final: bool
) -> PruneDecision:
    kept, blocks = removal.kept_blocks, engine.kept_blocks
    scores = {
        b: {"value": found.rise[b]["gate"].item(), "standard_error": found.error[b]["gate"].item()} for b in blocks
    }
    openness = {b: min([1.0, *(m.mean().item() for m in soft.mask[b].values())]) for b in blocks}
    mask = {b: {"value": value, "standard_error": 0.0} for b, value in openness.items()}
    order = sorted(blocks, key=lambda b: (b in kept, openness[b], -scores[b]["value"], -b))
    before = engine.model_config
    after = narrowed(before, kept, removal.narrow)
    heads, channels = (sum(before.widths(b)[i] - after.widths(b)[i] for b in kept) for i in range(2))
    why = "the last update reaches the target" if final else f"what the mask holds below {config.soft.threshold:g} goes"
    return PruneDecision(
        check=number, step=soft.step, criterion="gradient_flow", kept_before=blocks,
        dropped=tuple(b for b in blocks if b not in kept), kept_blocks=kept, order=tuple(order),
        scores={"gradient_flow": scores, "soft_mask": mask},  # type: ignore[dict-item]
        candidates=[], chosen_depth=len(kept), forced=final,
        reason=f"{len(blocks)} -> {len(kept)}: {why}; {heads} heads and {channels} channels of other blocks go, and "
        f"{removal.macs:.4f} of the multiply-accumulates of the start remain (target {target_share(config):.4f}).",
        score_only=False, narrow=removal.narrow,
    )  # fmt: skip
