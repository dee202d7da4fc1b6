"""How the run went, as a part of the report: time of a step, speed and memory, blocks over time."""

from __future__ import annotations

import math
import statistics
from collections import Counter

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
RANK_PARTS = {
    "data": "waiting for data",
    "compute": "forward, backward, optimizer",
    "communication": "communication, waiting included",
}
MOVED = 0.5
"""Share of the logged steps, at the end, that the table is about: the beginning compiles and fills caches."""


def activity_section(run: RunFolder) -> Markup | None:
    """HTML; None for a run that recorded none of it."""
    split = figure(activity_plots.time_split(run.metrics), "Time of a step by part")
    speed = figure(activity_plots.speed_and_memory(run.metrics), "Speed, utilisation, gradient norm, memory")
    maps = [figure(activity_plots.block_map(run.metrics, name), words) for name, words in activity_plots.MAPS.items()]
    maps = [m for m in maps if m is not None]
    ranks = _ranks(run)
    if split is None and speed is None and not maps and not ranks:
        return None
    return tag(
        "section",
        tag("h2", "Speed and health"),
        *((tag("h3", "Where the time of a step goes"), split, _split_table(run)) if split else ()),
        *((tag("h3", "Ranks beside each other"), *ranks) if ranks else ()),
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


def _ranks(run: RunFolder) -> list[Markup]:
    """What the median and the slowest rank took, and which one was the slowest; nothing where there was one rank."""
    looks = dict(zip(*series(run.metrics, "ranks/slowest"), strict=True))
    ratios = dict(zip(*series(run.metrics, "ranks/slowest_ratio"), strict=True))
    known = [s for s, r in ratios.items() if r > 1 and math.isfinite(r) and math.isfinite(looks.get(s, math.nan))]
    if not known:
        return []
    rows = []
    for part, words in RANK_PARTS.items():
        both = [late_median(run, f"ranks/{part}_seconds{end}") for end in ("", "_max")]
        if any(map(math.isfinite, both)):
            rows.append((words, *(sensible(v * 1e3) for v in both)))
    (rank, times), *_ = Counter(looks[step] for step in known).most_common(1)
    text = f"Rank {sensible(rank)} was the slowest at {times} of {len(known)} looks (monitor.slow_every). "
    most = sensible(max(ratios[step] for step in known))
    text += f"The slowest one took at most {most} times as long as the median one."
    return [table(("ms a step, medians of the later half", "median rank", "largest"), rows), tag("p", text)]


def late_median(run: RunFolder, name: str) -> float:
    """Median of a metric over the later half of what was logged; NaN without values."""
    _, values = series(run.metrics, name)
    finite = [v for v in values[int(len(values) * MOVED) :] if math.isfinite(v)]
    return statistics.median(finite) if finite else math.nan
