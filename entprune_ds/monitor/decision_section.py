"""One pruning check as a part of the report: blocks, reason, vote, scores."""

from __future__ import annotations

import math

from . import plots, tables
from .correlation import Correlations
from .html import Markup, figure, joined, table, tag
from .numbers import MISSING, block_ranges, blocks_text, sensible, with_error
from .race_section import race_section
from .records import Candidate, Decision


def decision_section(decision: Decision, original_depth: int) -> Markup:
    """HTML of one check; `original_depth` is the number of blocks of the unpruned model."""
    how = tables.how(decision)
    title = f"Check {decision.check}, step {decision.step:,}: depth {len(decision.kept_before)} → {decision.depth}"
    told_apart = tables.separation(decision)
    verb = "Would remove" if decision.score_only else "Removed"
    return tag(
        "article",
        tag("h3", title, tag("span", how, class_="chip"), tag("span", decision.criterion, class_="chip")),
        _blocks(decision, original_depth),
        tag("p", f"{verb} {blocks_text(decision.dropped)}. {tables.reason(decision)}"),
        tag("p", told_apart, class_="soft") if told_apart else None,
        figure(plots.vote(decision), f"Vote of check {decision.check}"),
        _vote(decision),
        race_section(decision.race),
        _scores(decision),
        tag("p", f"Digest of the decision: {decision.digest}", class_="soft") if decision.digest else None,
    )


def _blocks(decision: Decision, original_depth: int) -> Markup:
    spans = []
    for block in range(original_depth):
        state = "kept" if block in decision.kept_before else "gone"
        state = "leaving" if block in decision.removed else state
        spans.append(tag("span", block, class_=state, title=f"block {block}: {state}"))
    return tag("div", *spans, class_="blocks")


def _vote(decision: Decision) -> Markup | None:
    if not decision.candidates:
        return None
    timed = any(math.isfinite(c.step_seconds) for c in decision.candidates)
    time = ("step time (s)", "rank") if timed else ()
    head = (
        "depth",
        "NTK condition number",
        "rank",
        "ZiCo, mean",
        "ZiCo, sum",
        "rank",
        *time,
        "rank sum",
        "kept blocks",
    )
    rows = [_vote_row(c, c.depth == decision.chosen_depth, timed) for c in decision.candidates]
    chosen = [i for i, c in enumerate(decision.candidates) if c.depth == decision.chosen_depth]
    return table(head, rows, marked=chosen, class_="words-last")


def _vote_row(c: Candidate, chosen: bool, timed: bool) -> tuple[str, ...]:
    ntk = sensible(c.ntk, 4) if math.isfinite(c.ntk) else "invalid"
    zico = sensible(c.zico_mean, 4) if math.isfinite(c.zico_mean) else "invalid"
    time = (sensible(c.step_seconds, 4), sensible(c.time_rank)) if timed else ()
    figures = (
        ntk,
        sensible(c.ntk_rank),
        zico,
        sensible(c.zico_sum, 4),
        sensible(c.zico_rank),
        *time,
        sensible(c.total),
    )
    return (f"{c.depth}, chosen" if chosen else str(c.depth), *figures, block_ranges(c.kept_blocks))


def _scores(decision: Decision) -> Markup | None:
    """All criteria in the order of removal, and how far they agree with each other."""
    if not decision.scores:
        return None
    blocks = sorted(decision.kept_before, key=lambda b: (tables.place(decision, b) or math.inf, b))
    rows: list[tuple[str, ...]] = []
    for block in blocks:
        found = [scores.get(block) for scores in decision.scores.values()]
        place = tables.place(decision, block)
        cells = (MISSING if s is None else with_error(s.value, s.standard_error) for s in found)
        same = _not_told_apart(decision, block)
        rows.append((f"block {block}", MISSING if place is None else str(place), same, *cells))
    marked = [i for i, block in enumerate(blocks) if block in decision.removed]
    head = ("", "goes", "not told apart from", *decision.scores)
    return tag(
        "details",
        tag("summary", "Scores of all criteria, ± standard error"),
        table(head, rows, marked),
        correlation_tables(tables.correlations(decision)),
    )


def _not_told_apart(decision: Decision, block: int) -> str:
    """Blocks whose deciding score the draws could not tell from this one's."""
    score = decision.scores.get(decision.scored_by, {}).get(block)
    return MISSING if score is None or score.same_as is None else block_ranges(score.same_as) or "none"


def correlation_tables(found: Correlations) -> Markup | None:
    """Spearman's and Kendall's coefficients between all criteria; None with fewer than two."""
    if len(found.names) < 2:
        return None
    parts: list[Markup] = []
    for name, matrix in (("Spearman ρ", found.spearman), ("Kendall τ", found.kendall)):
        cells = ([f"{v:.2f}" if math.isfinite(v) else MISSING for v in row] for row in matrix)
        rows = [(criterion, *row) for criterion, row in zip(found.names, cells, strict=True)]
        parts.append(table((f"{name} between", *found.names), rows))
    return joined(parts)
