"""How the run went, as a part of the report: time of a step, speed and memory, blocks over time."""

from __future__ import annotations

import math
import statistics

from . import activity_plots
from .html import Markup, figure, table, tag
from .numbers import MISSING, percent, sensible
from .records import series
from .run_folder import RunFolder

MEANINGS = {
    "forward": "forward passes and the loss",
    "backward": "backward passes",
    "optimizer": "clipping, optimizer step, EMA",
    "teacher": "forward passes of the teacher",
    "communication": "collectives and traffic between pipeline stages, with waiting for other ranks",
    "data": "waiting for examples, drawing noise, copying to the device",
    "other": "logging, validation, checkpoints and samples between the steps, and Python",
}
MOVED = 0.5
"""Share of the logged steps, at the end, that the table is about: the beginning compiles and fills caches."""


def activity_section(run: RunFolder) -> Markup | None:
    """HTML; None for a run that recorded none of it."""
    split = figure(activity_plots.time_split(run.metrics), "Time of a step by part")
    speed = figure(activity_plots.speed_and_memory(run.metrics), "Speed, utilisation, gradient norm, memory")
    maps = [figure(activity_plots.block_map(run.metrics, name), words) for name, words in activity_plots.MAPS.items()]
    maps = [m for m in maps if m is not None]
    if split is None and speed is None and not maps:
        return None
    return tag(
        "section",
        tag("h2", "Speed and health"),
        *((tag("h3", "Where the time of a step goes"), split, _split_table(run)) if split else ()),
        *((tag("h3", "Speed, memory, gradients"), speed) if speed else ()),
        *((tag("h3", "What the blocks do"), *maps) if maps else ()),
    )


def _split_table(run: RunFolder) -> Markup:
    """Median of every part over the later half of the logged steps."""
    medians = {name: late_median(run, f"train/seconds_{name}") for name in activity_plots.PARTS}
    whole = sum(max(v, 0.0) for v in medians.values() if math.isfinite(v))
    rows = []
    for name, value in medians.items():
        if math.isfinite(value):
            share = percent(value / whole) if whole > 0 else MISSING
            rows.append((activity_plots.PARTS[name][0], sensible(value * 1e3), share, MEANINGS[name]))
    return table(("medians of the later half", "ms a step", "share", ""), rows, class_="words-last")


def late_median(run: RunFolder, name: str) -> float:
    """Median of a metric over the later half of what was logged; NaN without values."""
    _, values = series(run.metrics, name)
    finite = [v for v in values[int(len(values) * MOVED) :] if math.isfinite(v)]
    return statistics.median(finite) if finite else math.nan
