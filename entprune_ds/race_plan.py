"""How a recovery race spends its budget: successive halving as arithmetic, in steps of one candidate."""

from __future__ import annotations

from dataclasses import dataclass

from entprune_ds.config_methods import CRITERIA
from entprune_ds.config_schema import Config

MOST_CANDIDATES = 32
"""Keep-sets of a race that says nothing else; a larger budget gives each of them more steps."""
FIRST_STEPS = 4
"""Recovery steps of the first round of a race that says nothing else (tools/study_race.py: more candidates beat more
steps, and a quarter of the batch is as good a judge of a step at a quarter of its cost)."""
FORWARD_SHARE = 1 / 3
"""Cost of a forward pass in units of a forward and backward pass."""


@dataclass(frozen=True)
class Round:
    """One round: the worse half leaves at its end."""

    candidates: int
    steps: int
    """Recovery steps that each candidate has behind it at the end of the round, earlier rounds included."""


def rounds_of(candidates: int, first_steps: int) -> list[Round]:
    """Rounds until one is left: steps double, and the better half, rounded up, stays."""
    rounds, steps = [], first_steps
    while candidates > 1:
        rounds.append(Round(candidates, steps))
        candidates, steps = -(-candidates // 2), 2 * steps
    return rounds


def cost_of(rounds: list[Round], validation: float) -> float:
    """Steps of one candidate that all rounds take; survivors go on where they stopped.

    Args:
        validation: cost of one judgement, in the same unit.
    """
    done = [0, *(r.steps for r in rounds)]
    return sum(r.candidates * (r.steps - before + validation) for r, before in zip(rounds, done, strict=False))


def plan(
    budget: float, validation: float, candidates: int | None = None, first_steps: int | None = None
) -> list[Round]:
    """The rounds that fit a budget; what is not given follows from it.

    Without either, as many candidates as FIRST_STEPS allows start, at least 2 and at most MOST_CANDIDATES; then the
    first round grows as far as the budget reaches.

    Args:
        budget: steps of one candidate.
        validation: cost of one judgement, in the same unit.

    Raises:
        ValueError: when it is too small for 2 candidates and 1 step, or for what is given; says what is needed.
    """
    if candidates is None:
        tried = FIRST_STEPS if first_steps is None else first_steps
        fitting = (n for n in range(MOST_CANDIDATES, 2, -1) if cost_of(rounds_of(n, tried), validation) <= budget)
        candidates = next(fitting, 2)
    if first_steps is None:
        one, two = (cost_of(rounds_of(candidates, r), validation) for r in (1, 2))  # the cost is linear in them
        first_steps = 1 + max(0, int((budget - one) / (two - one) + 1e-9)) if candidates > 1 else 1
    rounds = rounds_of(candidates, first_steps)
    needed = cost_of(rounds, validation)
    if needed > budget * (1 + 1e-9):
        message = f"{candidates} candidates with {first_steps} steps in the first round cost {needed:.1f} steps"
        raise ValueError(f"{message} of a candidate, the budget has {budget:.1f}")
    return rounds


def trial_batch(config: Config) -> int:
    """Examples of a trial step: race.batch_size of the global batch, as a multiple of data.num_readers."""
    readers, total = config.data.num_readers, config.train.global_batch_size
    return min(total, readers * max(1, round(config.race.batch_size * total / readers)))


def check_budget(config: Config) -> float:
    """Steps of one candidate that the race of one check may take: its equal part of race.budget.

    The run counts as if no block left, num_steps x global batch x present blocks; a candidate counts its own blocks.
    """
    train, prune = config.train, config.prune
    run = train.num_steps * train.global_batch_size * len(config.model.blocks)
    return config.race.budget * run / prune.num_checks / ((prune.target_depth or 1) * trial_batch(config))


def validation_cost(config: Config) -> float:
    """Cost of judging one candidate, in its steps."""
    return FORWARD_SHARE * config.race.validation_draws / trial_batch(config)


def searches(config: Config) -> float:
    """Part of the budget that the race itself gets; a local search behind it takes the other half."""
    return 0.5 if config.race.local_search else 1.0


def race_problems(config: Config) -> list[str]:
    """Impossible values of `race.*` for prune.criterion=recovery_race; the other settings are sound."""
    race, found = config.race, []
    if not 0 < race.budget <= 1:
        found.append(f"`race.budget` must lie in (0, 1], got {race.budget}.")
    if not 0 < race.batch_size <= 1:
        found.append(f"`race.batch_size` must lie in (0, 1], got {race.batch_size}.")
    for key, least in dict(candidates=2, first_steps=1, validation_draws=2, local_search=0).items():
        got = getattr(race, key)
        if got is not None and got < least:
            found.append(f"`race.{key}` must be at least {least}, got {got}.")
    if race.learning_rate is not None and race.learning_rate <= 0:
        found.append(f"`race.learning_rate` must be above 0, got {race.learning_rate}.")
    if race.replicas not in ("auto", "true", "false"):
        found.append(f"`race.replicas` must be auto, true or false, got {race.replicas}.")
    if race.replicas == "true" and config.parallel.pipe_stages > 1:
        message = "`race.replicas=true` needs parallel.pipe_stages=1: it trains whole candidates on single ranks. "
        found.append(message + "Set it to auto or false.")
    unknown = sorted(set(race.origins) - {*ORIGINS, *GIVE_KEEP_SETS})
    if unknown or not race.origins or len(set(race.origins)) < len(race.origins):
        known = ", ".join((*ORIGINS, *GIVE_KEEP_SETS))
        found.append(f"`race.origins` must list some of {known}, each once, got {list(race.origins)}.")
    if found or config.prune.target_depth is None:
        return found
    try:
        plan(check_budget(config) * searches(config), validation_cost(config), race.candidates, race.first_steps)
        if race.local_search:
            plan(check_budget(config) / 2, validation_cost(config), 1 + race.local_search)
    except ValueError as problem:
        message = f"`race.budget` ({race.budget}) is too small at each of {config.prune.num_checks} checks: {problem}. "
        message += "Raise it or train.num_steps, lower race.validation_draws, race.batch_size or prune.num_checks"
        given = [f"race.{k}" for k in ("candidates", "first_steps", "local_search") if getattr(race, k)]
        found.append(message + "".join(f", or {key}" for key in given) + ".")
    return found


ORIGINS = ("spaced", "criteria", "random")
"""Where keep-sets come from, beside criteria by name."""
GIVE_KEEP_SETS = tuple(
    name for name in CRITERIA
    if name not in ("random", "every_other", "explicit", "spread_taylor", "combined", "recovery_race")
)  # fmt: skip
"""Criteria with scores, which `race.origins` may name; each gives a set that weighs them against even spacing, too."""
