"""scores.html: all criteria on one model, as `entprune-ds score` found them, on one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from . import score_plots
from .correlation import Correlations, rank_correlations
from .decision_section import correlation_tables
from .html import Markup, facts, figure, joined, page, table, tag
from .numbers import MISSING, number_or_nan, sensible, with_error


def tabled(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Scores as JSON has them -> {criterion: {block: (value, standard error)}}; null becomes NaN."""
    return {
        name: {int(b): (number_or_nan(s["value"]), number_or_nan(s["standard_error"])) for b, s in found.items()}
        for name, found in rows.items()
    }


def correlations_of(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Correlations:
    """Rank correlations between all scores as JSON has them."""
    return rank_correlations({name: {b: v for b, (v, _) in found.items()} for name, found in tabled(rows).items()})


def figures(result: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: PNG} of what there is to draw."""
    scores = tabled(result["scores"])
    drawn = {
        "scores_heat_map": score_plots.heat_map(scores),
        "scores_bars": score_plots.bars(scores),
        "scores_correlation": score_plots.correlation_matrices(correlations_of(result["scores"])),
    }
    return {name: png for name, png in drawn.items() if png is not None}


def render(result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bytes:
    """The whole page.

    Args:
        result: scores.json.
        pictures: of `figures`.
    """
    title = f"Scores of {result['model']['path']}"
    body = joined(
        [
            tag("p", "entprune_ds scores", class_="soft"),
            tag("h1", title),
            facts({**result["model"], **result["draws"]}),
            *(tag("h2", "Criteria"), _criteria(result["criteria"])),
            *(figure(png, name.replace("_", " ")) for name, png in pictures.items()),
            *(tag("h2", "Scores, ± standard error"), table(*block_rows(result["scores"]))),
            *(tag("h2", "Rank correlation"), correlation_tables(correlations_of(result["scores"]))),
            tag("footer", f"Written by entprune_ds {__version__}."),
        ]
    )
    return page(f"{title} · entprune_ds", body)


def criteria_rows(criteria: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(criterion, seconds, order of removal or why there is none)."""
    rows = []
    for name, found in criteria.items():
        seconds = MISSING if found["seconds"] is None else sensible(found["seconds"])
        said = found["note"] if found["order"] is None else " ".join(map(str, found["order"]))
        rows.append((name, seconds, said))
    return rows


def block_rows(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(head, one row per block): its score by each criterion, and from which blocks that cannot tell it apart."""
    blocks = sorted({int(b) for found in rows.values() for b in found})
    return ["block", *rows], [(str(b), *(_cell(found.get(str(b))) for found in rows.values())) for b in blocks]


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    text = with_error(number_or_nan(score["value"]), number_or_nan(score["standard_error"]))
    same: Sequence[int] = score.get("same_as") or ()
    return f"{text} (as {', '.join(map(str, same))})" if same else text


def _criteria(criteria: Mapping[str, Mapping[str, Any]]) -> Markup:
    return table(("", "seconds", "order of removal, first to go first"), criteria_rows(criteria), class_="words-last")
