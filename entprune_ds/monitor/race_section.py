"""The rounds of a recovery race as a part of the report."""

from __future__ import annotations

import math

from .html import Markup, table, tag
from .numbers import block_ranges, blocks_text, sensible
from .records import Race


def race_section(race: Race | None) -> Markup | None:
    """HTML of a race: a row for every keep-set, best first, and a column for every round; None where nothing raced."""
    if race is None:
        return None
    steps = [r.steps for r in race.rounds]
    lasted = {kept: place for place, r in enumerate(race.rounds) for kept in r.losses}

    def key(kept: tuple[int, ...]) -> tuple[bool, float, float]:
        loss = race.rounds[lasted[kept]].losses[kept]
        return kept != race.winner, -lasted[kept], loss if math.isfinite(loss) else math.inf

    ordered = sorted(lasted, key=key)
    rows = []
    for kept in ordered:
        cells = [_loss(r.losses.get(kept)) for r in race.rounds]
        rows.append((race.origins.get(kept, ""), *cells, block_ranges(kept)))
    head = ("keep-set from", *(f"after {s} steps" for s in steps), "blocks")
    share = f", {100 * race.share_of_run:.1f} % of the run's compute" if math.isfinite(race.share_of_run) else ""
    words = f"Loss on fixed draws after recovery steps; the worse half leaves after each round{share}. "
    return tag(
        "details",
        tag("summary", f"Recovery race of {len(ordered)} keep-sets, won by {blocks_text(race.winner)}"),
        tag("p", words, class_="soft"),
        table(head, rows, marked=[i for i, kept in enumerate(ordered) if kept == race.winner], class_="words-last"),
    )


def _loss(loss: float | None) -> str:
    if loss is None:
        return ""
    return sensible(loss, 4) if math.isfinite(loss) else "not finite"
