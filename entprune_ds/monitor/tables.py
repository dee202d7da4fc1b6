"""A decision as tables of plain values, as a sentence, and what its scores can and cannot tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .correlation import Correlations, rank_correlations
from .numbers import blocks_text, sensible
from .records import Decision

Cell = int | float | str | bool | None


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def score_table(decision: Decision) -> Table:
    """Block x criterion with standard errors; `place` is the position in the order of removal, 1 goes first."""
    criteria = tuple(decision.scores)
    columns = ["block", "removed", "place"]
    for criterion in criteria:
        columns += [criterion, f"{criterion} standard error"]
    rows = []
    for block in decision.kept_before if criteria else ():
        row: list[Cell] = [block, block in decision.removed, place(decision, block)]
        for criterion in criteria:
            score = decision.scores[criterion].get(block)
            row += [None, None] if score is None else [_plain(score.value), _plain(score.standard_error)]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


def vote_table(decision: Decision) -> Table:
    """Candidate depths with proxies, ranks and total; lower total wins."""
    names = ("ntk", "zico_mean", "zico_sum", "ntk_rank", "zico_rank", "total", "step_seconds", "time_rank")
    rows = []
    for c in decision.candidates:
        figures = [_plain(getattr(c, name)) for name in names]
        kept = " ".join(map(str, c.kept_blocks))
        rows.append((c.depth, c.depth == decision.chosen_depth, *figures, kept))
    return Table(("depth", "chosen", *names, "kept_blocks"), tuple(rows))


def how(decision: Decision) -> str:
    """How the depth came about, in two or three words."""
    if decision.score_only:
        return "scored only"
    return "removal forced" if decision.forced else "held back" if decision.held else "by vote"


def sentence(decision: Decision) -> str:
    """The decision in words."""
    verb = "would remove" if decision.score_only else "removed"
    text = f"Check {decision.check} at step {decision.step:,} {verb} {blocks_text(decision.dropped)}"
    text += f" ({how(decision)}, criterion {decision.criterion}); depth {len(decision.kept_before)} → {decision.depth}."
    return f"{text} {reason(decision)}".strip()


def reason(decision: Decision) -> str:
    """The recorded reason as a sentence of its own."""
    return decision.reason[:1].upper() + decision.reason[1:]


def place(decision: Decision, block: int) -> int | None:
    """Position of a block in the order of removal, from 1; None where the order does not name it."""
    return decision.order.index(block) + 1 if block in decision.order else None


def separation(decision: Decision) -> str:
    """How clearly the last block that went differs from the first that stayed; empty where that cannot be said.

    What the check recorded of the paired difference decides. In older records the standard errors are combined as if
    independent, though the draws are paired, so the true distance is rather larger.
    """
    scores = decision.scores.get(decision.criterion, {})
    ordered = [b for b in decision.order if b in scores]
    gone = [b for b in ordered if b in decision.dropped]
    stayed = [b for b in ordered if b not in decision.dropped]
    if not gone or not stayed:
        return ""
    last, first = scores[gone[-1]], scores[stayed[0]]
    pair = f"Last to go, block {gone[-1]}, and first to stay, block {stayed[0]}"
    if last.same_as is not None:
        of_draws = "these" if last.draws is None else f"{last.draws:,}"
        return f"{pair}: {'not ' if stayed[0] in last.same_as else ''}told apart by {of_draws} draws."
    error = math.hypot(last.standard_error, first.standard_error)
    if not error > 0:
        return ""
    distance = abs(first.value - last.value) / error
    verdict = "clearly different" if distance > 2 else "not told apart by this many draws"
    return f"{pair}: {sensible(distance, 2)} standard errors apart, {verdict}."


def correlations(decision: Decision) -> Correlations:
    """Rank correlations between all criteria that were scored at a check."""
    return rank_correlations({c: {b: s.value for b, s in found.items()} for c, found in decision.scores.items()})


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
