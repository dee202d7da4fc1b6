"""Figures of `entprune-ds score`: all criteria over the blocks of one model, and how far they agree.

Scores come as {criterion: {block: (value, standard error)}}.

Every function returns None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from .correlation import Correlations
from .numbers import sensible
from .plots import standardised
from .style import BLUE, GREY, PALE, as_png, label, one_panel

Scores = Mapping[str, Mapping[int, tuple[float, float]]]

PANEL_COLUMNS = 2
"""Bar panels side by side."""


@as_png
def heat_map(scores: Scores) -> Figure | None:
    """Criterion x block, standardised within each criterion; blocks without a score are grey."""
    blocks = _blocks(scores)
    if not blocks:
        return None
    grid = np.array([[found.get(b, (math.nan, math.nan))[0] for b in blocks] for found in scores.values()])
    figure, axes = one_panel(min(max(3.2 + 0.42 * len(blocks), 5.5), 8.4), 1.25 + 0.34 * len(scores))
    axes.set_facecolor(PALE)
    shade = standardised(grid)
    shown = axes.imshow(np.ma.masked_invalid(shade), cmap="cividis", vmin=-2, vmax=2, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if math.isfinite(value) and len(blocks) <= 16:
            ink = "white" if shade[row, column] < 0.3 else "black"
            axes.text(column, row, sensible(value, 2), ha="center", va="center", color=ink, fontsize=7.5)
    axes.set_xticks(range(len(blocks)), [str(b) for b in blocks])
    axes.set_yticks(range(len(scores)), [label(name) for name in scores])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xlabel("block (original index)")
    bar = figure.colorbar(shown, ax=axes, label="standardised score", pad=0.015, ticks=[-2, 0, 2])
    bar.ax.set_yticklabels(["≤ −2", "0", "≥ 2"])
    return figure


@as_png
def bars(scores: Scores) -> Figure | None:
    """One panel per criterion: its scores with their standard errors."""
    blocks = _blocks(scores)
    if not blocks:
        return None
    rows = -(-len(scores) // PANEL_COLUMNS)
    figure = Figure(figsize=(8.4, 0.4 + 1.55 * rows), layout="constrained")
    panels = list(figure.subplots(rows, PANEL_COLUMNS, squeeze=False).flat)
    for axes, (name, found) in zip(panels, scores.items(), strict=False):
        present = [b for b in blocks if math.isfinite(found.get(b, (math.nan, math.nan))[0])]
        errors = [e if math.isfinite(e) else 0.0 for e in (found[b][1] for b in present)]
        values, places = [found[b][0] for b in present], [blocks.index(b) for b in present]
        axes.bar(places, values, color=BLUE, width=0.7)
        axes.errorbar(places, values, yerr=errors, fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)
        step = -(-len(blocks) // 14)
        axes.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
        axes.set_title(label(name))
        axes.grid(axis="x", visible=False)
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    figure.supxlabel("block (original index)", fontsize=9, color="#374151")
    return figure


@as_png
def correlation_matrices(found: Correlations) -> Figure | None:
    """Spearman's rho and Kendall's tau between every two criteria."""
    if len(found.names) < 2:
        return None
    size = 1.3 + 0.36 * len(found.names)
    figure = Figure(figsize=(8.4, min(size, 8.4)), layout="constrained")
    shown = None
    for axes, name, matrix in zip(
        figure.subplots(1, 2), ("Spearman ρ", "Kendall τ"), (found.spearman, found.kendall), strict=True
    ):
        grid = np.array(matrix)
        axes.set_facecolor(PALE)
        shown = axes.imshow(np.ma.masked_invalid(grid), cmap="PuOr", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(grid):
            if math.isfinite(value) and len(found.names) <= 12:
                ink = "white" if abs(value) > 0.7 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=6.5)
        axes.set_xticks(range(len(found.names)), [label(n) for n in found.names], rotation=90)
        axes.set_yticks(range(len(found.names)), [label(n) for n in found.names])
        axes.grid(False)
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(name)
    if shown is not None:
        figure.colorbar(shown, ax=figure.axes, pad=0.015, shrink=0.7, ticks=[-1, 0, 1])
    return figure


def _blocks(scores: Scores) -> list[int]:
    return sorted({b for found in scores.values() for b, (value, _) in found.items() if math.isfinite(value)})
