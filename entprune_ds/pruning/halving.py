"""Successive halving over keep-sets: trials judge them, the worse half leaves, until one is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

KeepSet = tuple[int, ...]
Trial = Callable[[list[KeepSet], int, int], list[float]]
"""trial(keep_sets, start, stop) -> the loss of each after `stop` recovery steps, of which `start` are done already."""


class NoFiniteLossError(ValueError):
    """Every candidate of a round has diverged."""


@dataclass(frozen=True)
class RaceResult:
    """Who won, and how."""

    winner: KeepSet
    rounds: list[dict[str, Any]]
    """Plain values: {"steps", "losses": [{"kept_blocks", "loss" (None where not finite), "stays"}]} of each round."""


def race(keep_sets: Sequence[KeepSet], steps: Sequence[int], trial: Trial) -> RaceResult:
    """Race until one keep-set is left; with no more than one from the start nothing is tried.

    Of equal losses the one listed first wins. A loss that is not finite is worse than any other. Duplicates race once.

    Args:
        keep_sets: candidates, in the order that decides ties.
        steps: recovery steps behind each round, increasing; rounds that are not needed are left out.
        trial: see Trial.

    Raises:
        NoFiniteLossError: when no loss of a round is finite.
        ValueError: when the rounds end with more than one candidate.
    """
    alive, done, rounds = list(dict.fromkeys(keep_sets)), 0, []
    for stop in steps:
        if len(alive) < 2:
            break
        losses = trial(alive, done, stop)
        stays = better_half(losses)
        if not stays:
            message = f"no loss is finite after {stop} recovery steps of {len(alive)} keep-sets. Nothing was removed."
            raise NoFiniteLossError(f"{message} Lower race.learning_rate or train.learning_rate.")
        rounds.append({"steps": stop, "losses": _as_json(alive, losses, stays)})
        alive, done = [alive[i] for i in stays], stop
    if len(alive) != 1:
        raise ValueError(f"{len(alive)} keep-sets are left after {len(rounds)} rounds: there must be more rounds.")
    return RaceResult(alive[0], rounds)


def better_half(losses: Sequence[float]) -> list[int]:
    """Positions, ascending, of the lower half of the losses, rounded up; never of one that is not finite."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    best = sorted(finite, key=lambda i: (losses[i], i))
    return sorted(best[: -(-len(losses) // 2)])


def neighbours(winner: KeepSet, present: Sequence[int], protected: Sequence[int] = ()) -> list[KeepSet]:
    """Keep-sets that exchange one block of the winner for a missing one, nearest exchanges first."""
    leaving = [b for b in winner if b not in protected]
    swaps = [(abs(new - old), old, new) for old in leaving for new in present if new not in winner]
    return [tuple(sorted({*winner, new} - {old})) for _, old, new in sorted(swaps)]


def _as_json(keep_sets: list[KeepSet], losses: list[float], stays: list[int]) -> list[dict[str, Any]]:
    return [
        {"kept_blocks": list(kept), "loss": loss if math.isfinite(loss) else None, "stays": i in stays}
        for i, (kept, loss) in enumerate(zip(keep_sets, losses, strict=True))
    ]
