"""Figures of a run as PNG bytes: losses, depth, score heat map, vote, comparison with the base.

Every function returns None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .numbers import sensible
from .records import Decision, number, series, step_of
from .style import BLUE, GREY, ORANGE, PALE, RED, as_png, averaged, label, log_axis, one_panel, step_axis

MOST_POINTS = 1500
"""Points of one curve; longer ones are averaged in groups."""
CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train/loss", "training", dict(color=PALE, linewidth=1.0, zorder=2)),
    ("train/validation_loss", "validation", dict(color=BLUE, marker="o", markersize=3, zorder=3)),
    ("train/validation_loss_ema", "validation, EMA", dict(color=RED, marker="s", markersize=2.8, ls="--", zorder=3)),
)


@as_png
def loss_curves(metrics: Sequence[Mapping[str, Any]], decisions: Sequence[Decision]) -> Figure | None:
    """Training and validation loss (raw and EMA weights) over optimizer steps, with every removal marked."""
    figure, axes = one_panel(8.4, 3.2)
    seen: list[float] = []
    for name, text, style in CURVES:
        steps, values = _thinned(*series(metrics, name))
        finite = [v for v in values if math.isfinite(v)]
        if finite:
            seen += finite
            axes.plot(steps, values, label=text, **style)
            if name == "train/loss" and len(values) >= 40:
                smooth = averaged(steps, values, min(len(values) // 4, 150))
                axes.plot(*smooth, color=GREY, label="training, averaged", zorder=2.5)
    if not seen:
        return None
    if min(seen) > 0 and max(seen) > 10 * min(seen):
        log_axis(axes)
    for d in decisions:
        if d.removed:
            axes.axvline(d.step, color=ORANGE, linestyle=(0, (4, 2)), linewidth=1.1, zorder=1)
            at: dict[str, Any] = dict(transform=axes.get_xaxis_transform(), ha="center", va="bottom")
            axes.text(d.step, 1.01, f"−{len(d.removed)}", color="#8a5a00", fontsize=8.5, **at)
    step_axis(axes)
    axes.set_ylabel("loss")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


@as_png
def depth_over_time(decisions: Sequence[Decision], metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Number of transformer blocks over optimizer steps; checks that removed nothing are hollow."""
    steps, depths = series(metrics, "train/depth")
    if decisions:
        last = max([decisions[-1].step, *(step for row in metrics if (step := step_of(row)) is not None)])
        steps = [0, *(d.step for d in decisions), last]
        depths = [len(decisions[0].kept_before), *(d.depth for d in decisions), decisions[-1].depth]
    if not steps:
        return None
    figure, axes = one_panel(8.4, 2.3)
    axes.step(steps, depths, where="post", color=BLUE, linewidth=2)
    for d in decisions:
        axes.plot(d.step, d.depth, "o", color=BLUE, markersize=6, markerfacecolor=BLUE if d.removed else "white")
        text = f"−{len(d.removed)} → {d.depth}" if d.removed else "none removed"
        axes.annotate(text, (d.step, d.depth), xytext=(5, 5), textcoords="offset points", fontsize=8.5)
    axes.set_ylim(0, max(depths) * 1.12 + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    step_axis(axes)
    axes.set_ylabel("depth (blocks)")
    return figure


@as_png
def score_heat_map(decisions: Sequence[Decision], criterion: str) -> Figure | None:
    """Scores of one criterion, check x block, standardised within each check; blocks that left grey, leaving framed."""
    checks = [d for d in decisions if any(math.isfinite(s.value) for s in d.scores.get(criterion, {}).values())]
    if not checks:
        return None
    blocks = sorted({b for d in checks for b in d.kept_before})
    grid = np.full((len(checks), len(blocks)), np.nan)
    for row, decision in enumerate(checks):
        for block, score in decision.scores[criterion].items():
            if block in blocks:
                grid[row, blocks.index(block)] = score.value
    width = min(max(3.2 + 0.42 * len(blocks), 5.5), 8.4)
    figure, axes = one_panel(width, 1.25 + 0.34 * len(checks))
    axes.set_facecolor(PALE)
    standard = standardised(grid)
    shown = axes.imshow(np.ma.masked_invalid(standard), cmap="cividis", vmin=-2, vmax=2, aspect="auto")
    for row, decision in enumerate(checks):
        for column, block in enumerate(blocks):
            value = grid[row, column]
            if block in decision.removed:
                corner = (column - 0.46, row - 0.44)
                axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=RED, linewidth=2.2))
            if math.isfinite(value) and len(blocks) <= 16:
                ink = "white" if standard[row, column] < 0.3 else "black"
                axes.text(column, row, sensible(value, 2), ha="center", va="center", color=ink, fontsize=7.5)
    axes.set_xticks(range(len(blocks)), [str(b) for b in blocks])
    axes.set_yticks(range(len(checks)), [f"{d.check} (step {d.step:,})" for d in checks])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xlabel("block (original index)")
    axes.set_ylabel("check")
    bar = figure.colorbar(shown, ax=axes, label="standardised score", pad=0.015, ticks=[-2, 0, 2])
    bar.ax.set_yticklabels(["≤ −2", "0", "≥ 2"])
    axes.set_title(f"{label(criterion)}  (framed: leaves at this check; grey: has left)")
    return figure


def standardised(grid: np.ndarray) -> np.ndarray:
    """Each row minus its mean, over its standard deviation; NaN stays NaN, a row of equal values becomes 0."""
    spread = np.nanstd(grid, axis=1, keepdims=True)
    return (grid - np.nanmean(grid, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)


@as_png
def vote(decision: Decision) -> Figure | None:
    """The proxies and the rank sum of each candidate depth of one check; ranks as #n, the chosen depth shaded."""
    candidates = sorted(decision.candidates, key=lambda c: c.depth)
    if len(candidates) < 2:
        return None
    timed = any(math.isfinite(c.step_seconds) for c in candidates)
    figure = Figure(figsize=(8.4, 2.35), layout="constrained")
    first, second, *time, third = panels = figure.subplots(1, 4 if timed else 3)
    first.set_title("NTK condition number (lower is better)", fontsize=8.5)
    second.set_title("ZiCo, mean over layers (higher is better)", fontsize=8.5)
    third.set_title("weighted rank sum (lowest wins)", fontsize=8.5)
    _proxy(first, [c.ntk for c in candidates], [c.ntk_rank for c in candidates])
    _proxy(second, [c.zico_mean for c in candidates], [c.zico_rank for c in candidates])
    for axes in time:
        axes.set_title("step time (s, lower is better)", fontsize=8.5)
        _proxy(axes, [c.step_seconds for c in candidates], [c.time_rank for c in candidates])
    totals = [c.total for c in candidates]
    third.bar(range(len(totals)), [v if math.isfinite(v) else 0 for v in totals], color=GREY, width=0.55)
    _annotate(third, totals, [sensible(v) for v in totals])
    names = [f"{c.depth}\nchosen" if c.depth == decision.chosen_depth else str(c.depth) for c in candidates]
    for axes in panels:
        for place, candidate in enumerate(candidates):
            if candidate.depth == decision.chosen_depth:
                axes.axvspan(place - 0.48, place + 0.48, color="#fdf0cf", zorder=0)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="x", visible=False)
    figure.supxlabel("candidate depth (blocks)", fontsize=9, color="#374151")
    return figure


def _proxy(axes: Axes, values: Sequence[float], ranks: Sequence[float]) -> None:
    axes.plot(range(len(values)), values, "o-", color=BLUE, markersize=5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    notes = [f"#{sensible(r)}" if math.isfinite(v) else "invalid" for v, r in zip(values, ranks, strict=True)]
    _annotate(axes, values, notes)


def _annotate(axes: Axes, values: Sequence[float], notes: Sequence[str]) -> None:
    lowest = min((v for v in values if math.isfinite(v)), default=0.0)
    axes.margins(y=0.25)
    for place, (value, note) in enumerate(zip(values, notes, strict=True)):
        at = (place, value if math.isfinite(value) else lowest)
        axes.annotate(note, at, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)


@as_png
def comparison(evaluation: Mapping[str, Any]) -> Figure | None:
    """Bars of base against pruned: FID, and latency of each batch size; only what was measured."""
    panels = [("FID, lower is better", _both(evaluation, "fid"))]
    panels += [(f"latency, batch {label(b)} (ms)", _both(evaluation, "latency_ms", b)) for b in batches(evaluation)[:4]]
    panels = [(title, values) for title, values in panels if any(math.isfinite(v) for v in values)]
    if not panels:
        return None
    figure = Figure(figsize=(8.4, 0.35 + 0.78 * len(panels)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        lengths = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh([1, 0], lengths, color=[GREY, BLUE], height=0.72)
        for place, length, value in zip((1, 0), lengths, values, strict=True):
            note = sensible(value) if math.isfinite(value) else "not measured"
            at: dict[str, Any] = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
            axes.annotate(note, (length, place), **at)
        axes.set_yticks([1, 0], ["base", "pruned"])
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(lengths) * 1.12 or 1.0)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def batches(evaluation: Mapping[str, Any]) -> list[str]:
    """Batch sizes with a latency or a speed-up, smallest first, as they are written in evaluation.json."""
    found: set[str] = set()
    for place in (("base", "latency_ms"), ("pruned", "latency_ms"), ("speedup",)):
        values: Any = evaluation
        for key in place:
            values = values.get(key) if isinstance(values, Mapping) else None
        found |= {str(k) for k in values} if isinstance(values, Mapping) else set()
    return sorted(found, key=lambda b: (len(b), b))


def _thinned(steps: list[int], values: list[float]) -> tuple[Sequence[float], list[float]]:
    return averaged(steps, values, MOST_POINTS) if len(steps) > MOST_POINTS else (steps, values)


def _both(evaluation: Mapping[str, Any], *path: str) -> list[float]:
    return [number(evaluation, side, *path) for side in ("base", "pruned")]
