"""Curves of several runs over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .records import series
from .style import BLUE, GREY, ORANGE, RED, as_png, averaged, label, log_axis, step_axis

COLORS = (BLUE, RED, "#009E73", ORANGE, "#CC79A7", "#56B4E9", GREY, "#000000")
DASHES = ("-", "--", ":", "-.")
"""Runs beyond the colours differ by their dashes; dashes change with every run anyway, for whoever sees no colours."""
CURVES = (
    ("training loss", "train/loss"),
    ("validation loss, EMA", "train/validation_loss_ema"),
    ("validation loss", "train/validation_loss"),
    ("depth (blocks)", "train/depth"),
    ("examples a second", "train/examples_per_second"),
    ("ms a step, communication", "train/seconds_communication"),
    ("gradient norm", "train/grad_norm"),
    ("memory of the fullest rank (GiB)", "train/memory_rss_gib"),
    ("GPU memory, allocated (GiB)", "train/memory_allocated_gib"),
    ("model FLOPs utilisation", "train/mfu"),
)
MOST_POINTS = 300


@as_png
def overlaid(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """A panel for every curve that at least one run recorded, one line a run.

    Args:
        runs: {name: lines of metrics.jsonl}.
    """
    panels = []
    for title, name in CURVES:
        lines = {run: series(rows, name) for run, rows in runs.items()}
        lines = {run: line for run, line in lines.items() if any(math.isfinite(v) for v in line[1])}
        if lines:
            panels.append((title, name, lines))
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(8.4, 0.4 + 2.1 * rows), layout="constrained")
    every, handles = list(figure.subplots(rows, 2, squeeze=False).flat), {}
    for axes, (title, name, lines) in zip(every, panels, strict=False):
        for place, run in enumerate(runs):
            if run in lines:
                steps, values = _drawn(*lines[run], name)
                look: dict[str, Any] = dict(color=COLORS[place % len(COLORS)], ls=DASHES[place % len(DASHES)])
                draw = axes.step if name == "train/depth" else axes.plot
                more: dict[str, Any] = dict(where="post") if name == "train/depth" else {}
                handles[run] = draw(steps, values, linewidth=1.2, alpha=0.9, **look, **more)[0]
        _scale(axes, name, [v for _, values in lines.values() for v in values if math.isfinite(v)])
        axes.set_title(title)
        step_axis(axes)
        axes.xaxis.set_major_locator(_few())
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    figure.legend(list(handles.values()), [label(run) for run in handles], loc="outside upper left", ncols=3)
    return figure


def _drawn(steps: Sequence[int], values: Sequence[float], name: str) -> tuple[Sequence[float], Sequence[float]]:
    factor = 1e3 if name.startswith("train/seconds_") else 1.0
    scaled = [v * factor for v in values]
    if name == "train/depth" or len(steps) <= MOST_POINTS:
        return list(steps), scaled
    return averaged(steps, scaled, MOST_POINTS)


def _scale(axes: Any, name: str, values: Sequence[float]) -> None:
    if "loss" in name or "norm" in name:
        if min(values) > 0 and max(values) > 10 * min(values):
            log_axis(axes)
    else:
        factor = 1e3 if name.startswith("train/seconds_") else 1.0
        axes.set_ylim(0, max(values) * factor * 1.12 or 1)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=5)
