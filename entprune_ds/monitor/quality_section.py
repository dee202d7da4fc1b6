"""What was measured, from evaluation.json: headline figures, the table of quality and speed, and the protocol.

Nothing is computed that was not measured: no speed-up from block counts, no figure for a side that is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from . import plots
from .html import Markup, facts, figure, table, tag
from .numbers import MISSING, magnitude, percent, sensible
from .records import number
from .run_folder import RunFolder

ROWS = {
    "depth": "blocks",
    "original_depth": "blocks of the original",
    "parameters": "parameters",
    "fid": "FID, whole set",
    "fid_validation": "FID, validation split",
    "kid": "KID, whole set",
    "kid_validation": "KID, validation split",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}
"""Words for the fields of evaluation.json; unknown fields appear under their own name."""
LATENCY = {
    "depth": "blocks", "batch": "batch", "precision": "precision", "compile": "compiled", "parameters": "parameters",
    "macs": "multiply-accumulates", "median_ms": "ms, median", "p10_ms": "10 %", "p90_ms": "90 %",
    "images_per_second": "images a second", "speedup": "speed-up over the first row of the batch",
}  # fmt: skip
"""Columns of the latency table."""
MOST_ROWS = 200
"""Rows of the latency table that are shown."""


def headline_tiles(run: RunFolder) -> Markup | None:
    """Headline figures, base → pruned; each only when it was recorded."""
    values = run.evaluation
    before, after = number(values, "pruned", "original_depth"), number(values, "pruned", "depth")
    if run.decisions and not math.isfinite(after):
        before, after = len(run.decisions[0].kept_before), run.decisions[-1].depth
    kept = f"{percent(1 - after / before)} of the blocks removed" if before > 0 and math.isfinite(after) else ""
    base, pruned = _pair(run, "parameters")
    saved = f"{percent(1 - pruned / base)} fewer" if base > 0 and math.isfinite(pruned) else ""
    tiles = [
        _tile("Depth", sensible(before), sensible(after), kept),
        _tile("Parameters", magnitude(base), magnitude(pruned), saved),
        _tile("FID, whole set", *_shown(run, sensible, "fid"), "lower is better"),
        _tile("Class accuracy", *_shown(run, percent, "class_accuracy"), "of the samples"),
    ]
    for batch in plots.batches(values)[-1:]:
        speedup = number(values, "speedup", batch)
        tiles.append(_tile("Latency", *_shown(run, sensible, "latency_ms", batch), f"ms, batch {batch}"))
        if speedup > 0:
            tiles.append(_tile("Speed-up", MISSING, f"{speedup:.2f} ×", f"measured, batch {batch}"))
    found = [t for t in tiles if t is not None]
    return tag("div", *found, class_="tiles") if found else None


def _tile(name: str, before: str, after: str, note: str) -> Markup | None:
    """A figure; None when nothing was measured, one number when only one side was."""
    shown = [v for v in (before, after) if v != MISSING]
    if not shown:
        return None
    return tag("div", tag("span", name), tag("b", " → ".join(shown)), tag("span", note), class_="tile")


def _pair(run: RunFolder, *path: str) -> tuple[float, float]:
    return number(run.evaluation, "base", *path), number(run.evaluation, "pruned", *path)


def _shown(run: RunFolder, words: Callable[[float], str], *path: str) -> tuple[str, str]:
    base, pruned = _pair(run, *path)
    return words(base), words(pruned)


def quality_section(run: RunFolder) -> Markup | None:
    """Bars, table and protocol; None without evaluation.json."""
    if not run.evaluation:
        return None
    sides = {side: v for side in ("base", "pruned") if isinstance(v := run.evaluation.get(side), dict)}
    names = list(dict.fromkeys([*ROWS, *(k for v in sides.values() for k in v if k != "latency_ms")]))
    rows = [(ROWS.get(n, n), *(_cell(n, v.get(n)) for v in sides.values())) for n in names]
    for batch in plots.batches(run.evaluation):
        times = [number(v, "latency_ms", batch) for v in sides.values()]
        rows.append((f"latency, batch {batch} (ms)", *map(sensible, times)))
    rows = [r for r in rows if any(c != MISSING for c in r[1:])]
    speedups = [_speedup(run, b) for b in plots.batches(run.evaluation)]
    measured = ", ".join(text for text in speedups if text)
    protocol = run.evaluation.get("protocol")
    bars = plots.comparison(run.evaluation) if len(sides) == 2 else None
    return tag(
        "section",
        tag("h2", "Quality and speed"),
        figure(bars, "Base against pruned: FID and latency"),
        table(("", *sides), rows) if rows else None,
        tag("p", f"Measured speed-up: {measured}.") if measured else None,
        *_latency_table(run.evaluation.get("latency_table")),
        tag("h3", "Protocol"),
        facts(protocol) if isinstance(protocol, dict) and protocol else tag("p", "The protocol was not recorded."),
    )


def _latency_table(rows: object) -> tuple[Markup, ...]:
    """What `evaluate.latency_table` measured, under its heading; nothing where it did not."""
    found = [row for row in rows if isinstance(row, dict)][:MOST_ROWS] if isinstance(rows, list) else []
    if not found:
        return ()
    shown = [tuple(_latency_cell(name, row.get(name)) for name in LATENCY) for row in found]
    return tag("h3", "Latency of a forward pass"), table(tuple(LATENCY.values()), shown)


def _latency_cell(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    counted = number({"value": value}, "value")
    return magnitude(counted) if name in ("parameters", "macs") and math.isfinite(counted) else _cell(name, value)


def _speedup(run: RunFolder, batch: str) -> str:
    """Median, and the interquartile range where it was stored; empty when nothing was measured."""
    median = number(run.evaluation, "speedup", batch)
    low, high = (number(run.evaluation, "speedup_iqr", batch, q) for q in ("q25", "q75"))
    spread = f" ({low:.2f}–{high:.2f})" if low > 0 and high > 0 else ""
    return f"{median:.2f} ×{spread} at batch {batch}" if median > 0 else ""


def _cell(name: str, value: object) -> str:
    if value is None:
        return MISSING
    figure_ = number({"value": value}, "value")
    if not math.isfinite(figure_):
        return str(value)
    return percent(figure_) if name == "class_accuracy" else sensible(figure_)
