"""Figures of how a run went: where the time of a step goes, speed and memory, what every block does over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .records import MAX_BLOCKS, series
from .style import BLUE, GREY, ORANGE, PALE, RED, as_png, averaged, log_axis, one_panel, step_axis

PARTS = {
    "forward": ("forward", BLUE), "backward": ("backward", "#56B4E9"), "optimizer": ("optimizer and EMA", "#009E73"),
    "teacher": ("teacher", "#F0E442"), "communication": ("communication", RED), "data": ("waiting for data", ORANGE),
    "other": ("between steps", PALE),
}  # fmt: skip
"""Words and colours of the parts of a step, from the bottom of the stack."""
PANELS = (
    ("examples a second", {"train/examples_per_second": ""}),
    ("model FLOPs utilisation", {"train/mfu": ""}),
    ("share of the step that pipeline stages stand still", {"train/bubble_share": ""}),
    ("gradient norm", {"train/grad_norm": ""}),
    ("memory of the fullest rank (GiB)", {
        "train/memory_rss_gib": "process", "train/memory_allocated_gib": "GPU, allocated",
        "train/memory_reserved_gib": "GPU, reserved",
    }),
)  # fmt: skip
MAPS = {
    "residual": "Update of the residual stream, |block(x) − x| / |x|",
    "gate_attention": "Gate of the attention branch, mean absolute value",
    "gate_mlp": "Gate of the MLP branch, mean absolute value",
}
MOST_COLUMNS = 200
"""Points in time of a map; more are thinned."""
MOST_POINTS = 400

Rows = Sequence[Mapping[str, Any]]


@as_png
def time_split(metrics: Rows) -> Figure | None:
    """Milliseconds of a step by part, stacked, over optimizer steps."""
    found = {name: series(metrics, f"train/seconds_{name}") for name in PARTS}
    steps = max((s for s, _ in found.values()), key=len)
    known = {n: np.array(v) * 1e3 for n, (s, v) in found.items() if s == steps and any(math.isfinite(x) for x in v)}
    if not known or not steps:
        return None
    groups = min(len(steps), MOST_POINTS)
    at = averaged(steps, steps, groups)[0]
    heights = [np.clip(np.nan_to_num(averaged(steps, v.tolist(), groups)[1]), 0, None) for v in known.values()]
    figure, axes = one_panel(8.4, 2.9)
    colors = [PARTS[n][1] for n in known]
    if len(at) == 1:
        at, heights = [at[0] - 0.5, at[0] + 0.5], [np.repeat(h, 2) for h in heights]
    axes.stackplot(at, heights, labels=[PARTS[n][0] for n in known], colors=colors, linewidth=0.4, edgecolor="white")
    top = np.nanpercentile(np.sum(heights, axis=0), 90)  # a pause for a checkpoint must not flatten the rest
    axes.set_ylim(0, top * 1.3 if top > 0 else 1)
    step_axis(axes)
    axes.set_ylabel("ms a step")
    figure.legend(loc="outside upper left", ncols=7, columnspacing=1.2)
    return figure


@as_png
def speed_and_memory(metrics: Rows) -> Figure | None:
    """One panel for each of speed, utilisation, bubble, gradient norm and memory that was recorded."""
    panels = []
    for title, names in PANELS:
        lines = [(text, *series(metrics, name)) for name, text in names.items()]
        lines = [line for line in lines if any(math.isfinite(v) for v in line[2])]
        if lines:
            panels.append((title, lines))
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(8.4, 1.95 * rows), layout="constrained")
    every = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (title, lines) in zip(every, panels, strict=False):
        for (text, steps, values), color in zip(lines, (BLUE, RED, GREY), strict=False):
            thinned = averaged(steps, values, MOST_POINTS) if len(steps) > MOST_POINTS else (steps, values)
            axes.plot(*thinned, color=color, linewidth=1.1, label=text or None, marker="." if len(steps) < 30 else "")
        finite = [v for _, _, values in lines for v in values if math.isfinite(v)]
        if title == "gradient norm" and min(finite) > 0 and max(finite) > 20 * min(finite):
            log_axis(axes)
        else:
            axes.set_ylim(0, (max(finite) * 1.15) or 1)
        axes.set_title(title)
        step_axis(axes)
        if lines[0][0]:
            axes.legend(loc="lower right", ncols=3)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    return figure


@as_png
def block_map(metrics: Rows, name: str) -> Figure | None:
    """Map of train/NAME/block_B, block by step; blocks that have left are grey."""
    grid = block_grid(metrics, name)
    if grid is None:
        return None
    steps, blocks, values = grid
    figure, axes = one_panel(8.4, 1.15 + min(0.17 * len(blocks), 4.2))
    axes.set_facecolor(PALE)
    high = float(np.nanpercentile(values, 99)) if np.isfinite(values).any() else 1.0
    shown = axes.imshow(
        np.ma.masked_invalid(values), cmap="cividis", aspect="auto", vmin=0, vmax=high or 1.0, interpolation="nearest"
    )
    every = max(1, -(-len(blocks) // 14))
    axes.set_yticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]])
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).astype(int))
    axes.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xlabel("step")
    axes.set_ylabel("block (original index)")
    figure.colorbar(shown, ax=axes, pad=0.015)
    axes.set_title(f"{MAPS[name]}  (grey: has left)")
    return figure


def block_grid(metrics: Rows, name: str) -> tuple[list[int], list[int], np.ndarray] | None:
    """Steps, blocks and values (blocks, steps) of train/NAME/block_B; NaN where a block was not there. None without."""
    prefix = f"train/{name}/block_"
    blocks = sorted({int(k[len(prefix) :]) for row in metrics for k in row if _is_block(k, prefix)})
    found = [dict(zip(*series(metrics, f"{prefix}{b:02d}"), strict=True)) for b in blocks]
    steps = sorted({step for of_block in found for step in of_block})
    steps = steps[:: -(-len(steps) // MOST_COLUMNS) or 1]
    if not steps:
        return None
    return steps, blocks, np.array([[of_block.get(step, math.nan) for step in steps] for of_block in found])


def _is_block(key: str, prefix: str) -> bool:
    number = key.removeprefix(prefix)
    return number != key and number.isascii() and number.isdigit() and len(number) < 6 and int(number) < MAX_BLOCKS
