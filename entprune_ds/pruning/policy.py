"""When and how much: what a check decides is a pure function of its state, an order of removal and the proxies.

`open_depths` says which depths stand for election, the caller measures them, `propose` chooses. Everything that
either looks at is stored with the decision (`PruneDecision.state`, scores, candidates), so that it can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from entprune_ds.config import Config
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.schedule import blocks_per_check, candidate_depths, scheduled_checks, usable_checks
from entprune_ds.pruning.trend import Validation, not_recovered, validations_from
from entprune_ds.pruning.vote import Candidate, vote

OF_DECISION = ("check", "step", "kept_blocks", "criterion", "score_only")
"""Fields of CheckState that a decision has itself; its `state` holds the others."""


@dataclass(frozen=True, kw_only=True)
class CheckState:
    """All that a decision depends on beside scores and proxies: where the run is, and the settings that count."""

    check: int
    """Number of this check, from 0."""
    step: int
    """Optimizer steps done."""
    kept_blocks: tuple[int, ...]
    """Present blocks, sorted original indices."""
    later_checks: tuple[int, ...]
    """Steps of the checks after this one."""
    last_removal: int | None
    """Step of the last removal; None before any."""
    validations: tuple[Validation, ...]
    """Validation losses so far, in order; none where prune.recovery_tolerance does not ask for them."""
    criterion: str
    score_only: bool
    seed: int
    explicit_order: tuple[int, ...]
    combined: tuple[str, ...]
    target_depth: int
    cap: int
    """Most blocks that one check removes."""
    protected: tuple[int, ...]
    """Present or not, sorted original indices."""
    min_steps_between: int
    recovery_tolerance: float | None
    vote_weights: tuple[float, ...]
    vote_tolerance: float

    @property
    def depth(self) -> int:
        """Present blocks."""
        return len(self.kept_blocks)


@dataclass(frozen=True)
class Choice:
    """The depths that stand for election at a check."""

    depths: list[int]
    """Deepest first."""
    held: str
    """Why the check has to wait, as a clause; empty when it is free."""
    forced: bool
    """Whether something has to go."""

    @property
    def removes_nothing(self) -> bool:
        """Whether the check waits, so that nothing needs to be ranked or measured."""
        return bool(self.held) and not self.forced


def state_of(
    config: Config, check: int, step: int, kept_blocks: tuple[int, ...], original_depth: int,
    last_removal: int | None = None, validations: Sequence[Validation] = (),
) -> CheckState:  # fmt: skip
    """The state of a check of a run.

    Args:
        original_depth: blocks at the start of the run, which the default cap refers to.
        validations: of the run so far, in order.
    """
    prune, target = config.prune, config.prune.target_depth or 1
    cap = blocks_per_check(prune, original_depth)
    if prune.score_only:  # nothing goes, so the last checks would be out of reach of any cap
        cap = max(cap, len(kept_blocks) - target)
    return CheckState(
        check=check, step=step, kept_blocks=kept_blocks,
        later_checks=tuple(scheduled_checks(config)[check + 1 :]), last_removal=last_removal,
        validations=() if prune.recovery_tolerance is None else tuple(validations),
        criterion=prune.criterion, score_only=prune.score_only, seed=config.run.seed,
        explicit_order=prune.explicit_order, combined=prune.combined, target_depth=target, cap=cap,
        protected=config.protected_blocks, min_steps_between=prune.min_steps_between,
        recovery_tolerance=prune.recovery_tolerance, vote_weights=prune.vote_weights,
        vote_tolerance=prune.vote_tolerance,
    )  # fmt: skip


def open_depths(state: CheckState) -> Choice:
    """Which depths this check may choose, and whether it has to wait. Pure.

    A check waits while fewer than `min_steps_between` steps have passed since the last removal, or while the model
    has not recovered from it. It then removes nothing, or where the cap would not let the later checks reach the
    target any more, the least that must go.

    Raises:
        ValueError: when the target is out of reach: too many blocks are protected, or too few checks remain.
    """
    protected = sorted(set(state.protected) & set(state.kept_blocks))
    if len(protected) > state.target_depth:
        raise ValueError(
            f"check {state.check}: blocks {protected} are protected, more than the target depth {state.target_depth}. "
            "Nothing was removed. Take some out of `prune.protected_blocks`, or raise `prune.target_depth`."
        )
    gap, to_remove = 0 if state.score_only else state.min_steps_between, state.depth - state.target_depth
    if_kept = 1 + usable_checks(state.later_checks, state.last_removal, gap)
    if_removed = usable_checks(state.later_checks, state.step, gap)
    depths = candidate_depths(state.depth, state.target_depth, state.cap, if_kept, if_removed)
    held = "" if state.score_only or to_remove <= 0 else _reason_to_wait(state)
    forced = depths[0] < state.depth
    return Choice(depths[:1] if held else depths, held, forced)


def _reason_to_wait(state: CheckState) -> str:
    if state.last_removal is not None and state.step - state.last_removal < state.min_steps_between:
        passed = f"{state.step - state.last_removal} steps have passed since the last removal"
        return f"{passed}, fewer than prune.min_steps_between={state.min_steps_between}"
    if state.recovery_tolerance is None:
        return ""
    return not_recovered(state.validations, state.step, state.recovery_tolerance)


def protected_last(order: Sequence[int], protected: Sequence[int]) -> list[int]:
    """An order of removal in which the protected blocks come last, so that no target above their number takes one."""
    return [b for b in order if b not in protected] + [b for b in order if b in protected]


def propose(
    state: CheckState, order: Sequence[int], candidates: Sequence[Candidate], scores: dict[str, Any]
) -> PruneDecision:
    """The decision of a check. Pure: equal arguments give an equal decision, digest included.

    Args:
        state: see CheckState.
        order: present blocks, first to go first, the protected ones last; empty where nothing was ranked.
        candidates: the depths of `open_depths(state)` with their proxies; none where it removes nothing.
        scores: plain values, for the record.

    Raises:
        ValueError: when the candidates are not the depths that stand for election.
    """
    choice = open_depths(state)
    expected = [] if choice.removes_nothing else choice.depths
    if sorted((c.depth for c in candidates), reverse=True) != expected:
        found = [c.depth for c in candidates]
        raise ValueError(f"check {state.check}: the candidates have depths {found}, but {expected} stand for election.")
    if candidates:
        outcome = vote(candidates, state.vote_weights, state.vote_tolerance)
        kept, rows, tied = outcome.chosen.kept_blocks, outcome.as_json(), outcome.tied_depths
    else:
        kept, rows, tied = state.kept_blocks, [], []
    return PruneDecision(
        check=state.check, step=state.step, criterion=state.criterion, kept_before=state.kept_blocks,
        dropped=tuple(b for b in state.kept_blocks if b not in kept), kept_blocks=kept, order=tuple(order),
        scores=scores, candidates=rows, chosen_depth=len(kept), forced=choice.forced,
        reason=_reason(state, choice, len(kept), tied), score_only=state.score_only, held=choice.held,
        state={f.name: getattr(state, f.name) for f in fields(state) if f.name not in OF_DECISION},
    )  # fmt: skip


def _reason(state: CheckState, choice: Choice, chosen: int, equal: list[int]) -> str:
    change, at_least = f"{state.depth} -> {chosen}", state.depth - choice.depths[0]
    if choice.removes_nothing:
        return f"{change}: {choice.held}."
    if choice.held:
        return f"{change}: {choice.held}, but {at_least} had to go to leave the target within reach."
    if len(choice.depths) == 1:
        last = not state.later_checks
        if state.depth <= state.target_depth:
            return f"{change}: the target is reached, nothing is left to remove."
        why = "the last check reaches the target" if last else "only this depth leaves the target within reach"
        return f"{change}: {why}."
    voters = [name for name, weight in zip(("NTK", "ZiCo", "step time"), state.vote_weights, strict=True) if weight]
    floor = f"; at least {at_least} had to go" if at_least else ""
    tied = f"; depths {equal} tie and the deepest wins" if len(equal) > 1 else ""
    ranks = " and ".join([", ".join(voters[:-1]), voters[-1]] if len(voters) > 1 else voters)
    return f"{change}: lowest weighted sum of the {ranks} ranks among depths {choice.depths}{tied}{floor}."


def state_from(decision: PruneDecision) -> CheckState | None:
    """The state that a decision was made from; None for older records, which do not hold it.

    Raises:
        ValueError: when the recorded state has other fields than this version knows.
    """
    if not decision.state:
        return None
    if not isinstance(decision.state, dict):
        raise ValueError(f"the state of check {decision.check} is no object.")
    stored: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in decision.state.items()}
    known = {f.name: f.default is MISSING for f in fields(CheckState) if f.name not in OF_DECISION}
    wrong = ", ".join(sorted(set(stored) - set(known) | {n for n, needed in known.items() if needed} - set(stored)))
    if wrong:
        raise ValueError(f"the state of check {decision.check} has missing or unknown fields: {wrong}.")
    stored |= {name: getattr(decision, name) for name in OF_DECISION if name != "kept_blocks"}
    stored |= {"kept_blocks": decision.kept_before, "validations": tuple(validations_from(stored["validations"]))}
    return CheckState(**stored)


def candidates_from(decision: PruneDecision) -> list[Candidate]:
    """The proxies that a decision was made from, without their ranks."""
    return [
        Candidate(**{f.name: row.get(f.name) for f in fields(Candidate)} | {"kept_blocks": tuple(row["kept_blocks"])})
        for row in decision.candidates
    ]
