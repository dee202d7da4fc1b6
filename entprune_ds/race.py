"""The recovery race: keep-sets recover for a few steps each, and the one that recovers best decides the order.

Damage right after a removal says little about the loss after recovery, a few steps of recovery say a lot. So candidates
of the target depth start from the run's state, train on the same draws, and successive halving spends the budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.diffusion.objective import Draws, build_objective
from entprune_ds.engine.build import Engine
from entprune_ds.importance.criteria import RankingRequest
from entprune_ds.importance.keep_sets import Origin, candidates
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Score, Scores
from entprune_ds.logs import get_logger
from entprune_ds.pruning.halving import KeepSet, NoFiniteLossError, RaceResult, neighbours, race
from entprune_ds.race_plan import Round, check_budget, cost_of, plan, searches, trial_batch, validation_cost
from entprune_ds.race_replicas import Replicas, fits, gathered_state
from entprune_ds.race_sharded import Sharded
from entprune_ds.race_trial import Recovery

log = get_logger()


@dataclass(frozen=True)
class Race:
    """What a race has found."""

    scores: Scores
    """{"recovery_race": {block: place in the order of removal, from 0}}."""
    record: dict[str, Any]
    """Plain values for the decision; empty where there was nothing to choose."""


def hold_race(engine: Engine, m: Measuring, scores: Scores, step: int) -> tuple[Race, Engine]:
    """Race keep-sets of the target depth, each check anew. Collective; `engine` may be spent.

    Args:
        engine: the run's.
        m: the check.
        scores: of the sweep; they give candidates, and the order on both sides of the winner.
        step: optimizer steps done.

    Returns:
        The race, and the engine to go on with: the same state, to the bit.

    Raises:
        DistributedError: on all ranks, when no candidate keeps a finite loss.
    """
    config = m.config
    protected = tuple(b for b in config.protected_blocks if b in m.kept_blocks)
    rounds, sets = entrants(m, scores, protected)
    if len(sets) < 2:
        return Race(order_scores(sets[0].kept_blocks if sets else m.kept_blocks, scores, m.kept_blocks), {}), engine
    batch = m.draw("race/validation", config.race.validation_draws)
    objective = build_objective(config.model, config.diffusion)
    recovery = Recovery(config, m.check, step, objective, Draws(*batch))
    alone = on_replicas(engine, config, len(sets))
    trials: Replicas | Sharded = replicas(engine, recovery) if alone else Sharded(engine, recovery)
    try:
        winner, record = raced(trials, config, rounds, sets, m.kept_blocks, protected)
    except NoFiniteLossError as problem:  # the same on all ranks
        raise comm.DistributedError(f"check {m.check}, recovery race: {problem}") from problem
    record |= {"executor": "replicas" if alone else "sharded", "batch_size": trial_batch(config)}
    engine = trials.restored() if isinstance(trials, Sharded) else engine
    return Race(order_scores(winner, scores, m.kept_blocks), record), engine


def entrants(m: Measuring, scores: Scores, protected: Sequence[int]) -> tuple[list[Round], list[Origin]]:
    """Candidates that the budget of a check allows, and their rounds; fewer candidates get more steps.

    All of them hold the protected blocks.
    """
    config, target = m.config, m.config.prune.target_depth or 1
    request = RankingRequest(
        scores=scores, kept_blocks=m.kept_blocks, target_depth=min(target, len(m.kept_blocks)),
        seed=config.run.seed, check=m.check, explicit_order=(),
    )  # fmt: skip
    budget, judging, wanted = check_budget(config) * searches(config), validation_cost(config), config.race
    rounds = plan(budget, judging, wanted.candidates, wanted.first_steps)
    sets = candidates(request, rounds[0].candidates, wanted.origins, protected)
    return plan(budget, judging, len(sets), wanted.first_steps) if len(sets) > 1 else [], sets


def on_replicas(engine: Engine, config: Config, count: int) -> bool:
    """Whether every rank trains candidates of its own. Collective.

    Raises:
        DistributedError: on all ranks, when race.replicas=true and they do not fit.
    """
    wanted = config.race.replicas
    if wanted == "false" or engine.cut is not None:
        return False
    room = fits(engine, config, count)
    if wanted == "true" and not room:
        message = "`race.replicas=true`, but whole candidates do not fit into the free memory of every rank. Set it to "
        raise comm.DistributedError(message + "auto or false, or lower train.micro_batch_size or race.candidates.")
    return room


def replicas(engine: Engine, recovery: Recovery) -> Replicas:
    """Trials on single ranks from the state of the run. Collective."""
    settings = {k: v for k, v in engine.optimizer.param_groups[0].items() if k in ("betas", "eps", "weight_decay")}
    micro = engine.ds.train_micro_batch_size_per_gpu()
    return Replicas(engine.model_config, gathered_state(engine), recovery, micro, engine.dtype, settings)


def raced(
    trials: Replicas | Sharded, config: Config, rounds: list[Round], sets: list[Origin], present: Sequence[int],
    protected: Sequence[int],
) -> tuple[KeepSet, dict[str, Any]]:  # fmt: skip
    """The race, and a second one of the winner's neighbours where race.local_search asks for it."""
    judging = validation_cost(config)
    found = _one_race(trials, [c.kept_blocks for c in sets], rounds, judging)
    record: dict[str, Any] = {"candidates": [c._asdict() for c in sets], "rounds": found.rounds}
    cost, winner = cost_of(rounds, judging), found.winner
    if config.race.local_search:
        tried = {c.kept_blocks for c in sets}
        near = [n for n in neighbours(winner, present, protected) if n not in tried][: config.race.local_search]
        again = plan(check_budget(config) / 2, judging, 1 + len(near)) if near else []
        record["candidates"] += [{"kept_blocks": kept, "origin": "local search"} for kept in near]
        found = _one_race(trials, [winner, *near], again, judging)
        record["rounds"], winner = record["rounds"] + found.rounds, found.winner
        cost += cost_of(again, judging)
    share = cost / check_budget(config) * config.race.budget / config.prune.num_checks
    return winner, record | {"winner": winner, "share_of_run": share}


def _one_race(
    trials: Replicas | Sharded, sets: list[KeepSet], rounds: list[Round], judging: float
) -> RaceResult:  # fmt: skip
    clock = Clock(rounds, judging)

    def trial(keep_sets: list[KeepSet], start: int, stop: int) -> list[float]:
        clock.next_round(len(keep_sets), start, stop)
        losses = comm.broadcast_json(trials.run(keep_sets, start, stop, clock.watch))
        leader = min(range(len(losses)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
        log.info("race: after %d steps %s leads with loss %.5f", stop, list(keep_sets[leader]), losses[leader])
        return losses

    return race(sets, [r.steps for r in rounds], trial)


class Clock:
    """Says how far a race is, and what is left of it, every `seconds`."""

    seconds = 10.0

    def __init__(self, rounds: list[Round], judging: float):
        self.rounds, self.judging, self.number = rounds, judging, 0
        self.start = self.shown = time.monotonic()

    def next_round(self, count: int, start: int, stop: int) -> None:
        """Another round begins."""
        self.number += 1
        text = "race: round %d of %d, %d keep-sets, from %d to %d recovery steps"
        log.info(text, self.number, len(self.rounds), count, start, stop)

    def watch(self, share: float) -> None:
        """A share of the present round is done."""
        now = time.monotonic()
        if now - self.shown < self.seconds:
            return
        self.shown = now
        before = cost_of(self.rounds[: self.number - 1], self.judging)
        done = before + share * (cost_of(self.rounds[: self.number], self.judging) - before)
        left = (now - self.start) / done * (cost_of(self.rounds, self.judging) - done)
        text = "race: round %d of %d, %.0f %% of it done, %.0f s left"
        log.info(text, self.number, len(self.rounds), 100 * share, left)


def order_scores(winner: Sequence[int], scores: Scores, present: Sequence[int]) -> Scores:
    """Places in the order of removal: blocks outside the winner first, on both sides the lowest `loss` score first.

    So the one-shot case keeps exactly the winner, and a check that removes less begins with what hurts least.
    """
    loss = scores.get("loss", {})
    order = sorted(present, key=lambda b: (b in winner, loss[b].value if b in loss else 0.0, -b))
    return {"recovery_race": {block: Score(float(order.index(block)), 0.0) for block in present}}
