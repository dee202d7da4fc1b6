"""Figures of a comparison as PNG bytes: FID by contestant, damage against FID, scores of keep-sets against FID."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .style import BLUE, GREY, ORANGE, RED, as_png, label, one_panel

Points = Mapping[str, Sequence[float]]


@as_png
def bars(values: Points, errors: Mapping[str, float], title: str) -> Figure | None:
    """One bar per contestant in the given order, with its standard error, and a dot per seed."""
    if not values:
        return None
    names = list(values)
    figure, axes = one_panel(8.4, 1.0 + 0.3 * len(names))
    for place, name in enumerate(names):
        height, error = sum(values[name]) / len(values[name]), errors.get(name, math.nan)
        whisker: dict[str, Any] = dict(xerr=error, ecolor=GREY, capsize=3) if math.isfinite(error) else {}
        axes.barh(place, height, color=BLUE, alpha=0.45, height=0.7, **whisker)
        axes.plot(values[name], [place] * len(values[name]), "o", color=BLUE, markersize=3.5)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure


@as_png
def scatter(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> Figure | None:
    """One named dot per contestant."""
    finite = {n: (x, y) for n, (x, y) in points.items() if math.isfinite(x) and math.isfinite(y)}
    if not finite:
        return None
    figure, axes = one_panel(6.4, 4.0)
    for name, (x, y) in finite.items():
        axes.plot(x, y, "o", color=BLUE, markersize=5)
        axes.annotate(label(name), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    if min(x for x, _ in finite.values()) > 0:
        axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure


@as_png
def score_panels(
    scores: Mapping[str, Sequence[float]], short: Sequence[float], long: Sequence[float], special: Sequence[bool]
) -> Figure | None:
    """A panel per score: its value for every keep-set against the FID after a short and after a long recovery.

    Args:
        scores: {score: one value per keep-set}.
        short, long: FID per keep-set.
        special: whether a criterion chose the keep-set; these are filled.
    """
    if not scores or not short:
        return None
    columns = 4
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(9.6, 2.3 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, values) in zip(panels, scores.items(), strict=False):
        for heights, color, marker in ((short, BLUE, "o"), (long, RED, "s")):
            for chosen, face in ((False, "white"), (True, ORANGE)):
                at = [i for i, s in enumerate(special) if s == chosen]
                x, y = [values[i] for i in at], [heights[i] for i in at]
                axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=3.5, linestyle="none")
        axes.set_title(label(name), fontsize=7.5)
        axes.tick_params(labelsize=6.5)
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    note = "FID: o after the short, square after the long recovery; filled: chosen by a criterion"
    figure.supylabel(note, fontsize=7.5)
    return figure
