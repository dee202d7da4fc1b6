"""score.mode=greedy: the blocks are scored again after each that goes, on the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance.measuring import Batch, Draw, Measuring
from entprune_ds.importance.scores import Scores
from entprune_ds.importance.stack_memory import KeptStreams


class Replay:
    """Draws that every round sees again from the first."""

    def __init__(self, draw: Draw):
        self._draw = draw
        self._seen: dict[str, list[Batch]] = {}
        self._next: dict[str, int] = {}

    def rewind(self) -> None:
        """Begin a round."""
        self._next = {}

    def __call__(self, purpose: str, count: int, t: Tensor | None = None) -> Batch:
        """See Measuring.draw; every round asks for the same counts."""
        seen, place = self._seen.setdefault(purpose, []), self._next.get(purpose, 0)
        if place == len(seen):
            seen.append(self._draw(purpose, count, t))
        if len(seen[place].labels) != count:
            before = len(seen[place].labels)
            raise ValueError(f"draw {place} of {purpose} took {before} examples before and now {count}.")
        self._next[purpose] = place + 1
        return seen[place]


Order = Callable[[Scores, tuple[int, ...]], list[int]]
"""(scores, blocks) -> the blocks, first to go first."""


def greedy_scores(m: Measuring, measure: Callable[[Measuring], Scores], order: Order, removals: int) -> Scores:
    """Scores of brute-force greedy: measure, drop the first in order, measure again.

    What a round shares with the one before is taken over: the draws, and the streams before the removed block.
    Collective: all ranks call, with `measure` and `order` that agree on all of them.

    Args:
        m: the check.
        measure: scores of m.kept_blocks.
        order: of the criterion.
        removals: blocks that this check may remove; at most one fewer than there are.

    Returns:
        All scores of the first round; of round R + 1 those of the criterion, named criterion/greedyR.
    """
    draw, criterion = Replay(m.draw), m.config.prune.criterion
    m = replace(m, draw=draw, streams=KeptStreams(m.config, comm.world_size(), len(m.kept_blocks)))
    now = measure(m)
    scores = dict(now)
    for number in range(1, removals):
        gone = order(now, m.kept_blocks)[0]
        m = replace(m, kept_blocks=tuple(b for b in m.kept_blocks if b != gone))
        draw.rewind()
        now = measure(m)
        scores[f"{criterion}/greedy{number}"] = now[criterion]
    return scores


def greedy_order(scores: Scores, criterion: str, kept_blocks: tuple[int, ...], order: Order) -> list[int]:
    """The order of removal that recorded scores give: a block for every further round, the rest as the last ranks them.

    Pure. Scores of a single round give the order of the criterion.
    """
    ranked, gone = order(scores, kept_blocks), list[int]()
    while (name := f"{criterion}/greedy{len(gone) + 1}") in scores:
        gone.append(ranked[0])
        ranked = order({criterion: scores[name]}, tuple(b for b in kept_blocks if b not in gone))
    return gone + ranked
