"""`entprune-ds report A B`: several runs on one self-contained page, side by side.

As in the report of one run, figures appear only where they were measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..atomic import write_bytes
from ..plain_yaml import read_yaml
from . import tables
from .activity_section import late_median
from .html import Markup, figure, flattened, joined, page, png_width, table, tag
from .numbers import MISSING, blocks_text, magnitude, percent, sensible
from .records import Decision, number, series
from .run_folder import RunFolder, read_run_folder
from .runs_plots import overlaid

COMPARISON_FILE = "comparison.html"
NOT_COMPARED = ("run.name", "run.root")
"""Settings that always differ."""


def build_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the comparison of run folders to `out`.

    Returns:
        Path of the page.

    Raises:
        ValueError: a folder is not one.
        OSError: the page cannot be written; an earlier one is untouched.
    """
    runs = dict(zip(distinct_names(folders), map(read_run_folder, folders), strict=True))
    write_bytes(out, render(runs))
    return out


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for every folder: its own, with as many folders above it as tell it from the others."""
    paths = [Path(os.path.realpath(folder)).parts for folder in folders]  # a loop of links too
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run folder is named twice. Give each run once.")


def render(runs: Mapping[str, RunFolder]) -> bytes:
    """The whole page."""
    settings = _settings(runs)
    notes = [tag("li", f"{name}: {problem}") for name, run in runs.items() for problem in run.problems]
    title = " · ".join(runs)
    curves = figure(overlaid({name: run.metrics for name, run in runs.items()}), "Curves of all runs")
    body = joined(
        [
            tag("p", "entprune_ds comparison of runs", class_="soft"),
            tag("h1", title),
            tag("div", tag("b", "Missing or damaged"), tag("ul", *notes), class_="notes") if notes else None,
            tag("section", tag("h2", "Final figures"), table(("", *runs), final_rows(runs), class_="many")),
            tag("section", tag("h2", "Curves"), curves) if curves else None,
            settings,
            _decisions(runs),
            _samples(runs),
            tag("footer", f"Written by entprune_ds {__version__} from the files of these run folders."),
        ]
    )
    return page(f"{title} · entprune_ds", body)


def final_rows(runs: Mapping[str, RunFolder]) -> list[tuple[str, ...]]:
    """One row for every figure that at least one run has."""
    rows: list[tuple[str, ...]] = []

    def add(words: str, shown: Any, values: list[float]) -> None:
        if any(math.isfinite(v) for v in values):
            rows.append((words, *(shown(v) if math.isfinite(v) else MISSING for v in values)))

    found = list(runs.values())
    add("steps", sensible, [_last(run, "train/loss")[0] for run in found])
    add("depth", sensible, [_depth(run) for run in found])
    for words, name in (
        ("training loss, last", "train/loss"),
        ("validation loss, last", "train/validation_loss"),
        ("validation loss of the EMA, last", "train/validation_loss_ema"),
    ):
        add(words, lambda v: sensible(v, 4), [_last(run, name)[1] for run in found])
    lowest = [min(_finite(run, "train/validation_loss_ema"), default=math.nan) for run in found]
    add("validation loss of the EMA, lowest", lambda v: sensible(v, 4), lowest)
    for words, name, factor in (
        ("ms a step, median of the later half", "train/step_seconds", 1e3),
        ("examples a second, median of the later half", "train/examples_per_second", 1.0),
    ):
        add(words, sensible, [late_median(run, name) * factor for run in found])
    add("model FLOPs utilisation, median", percent, [late_median(run, "train/mfu") for run in found])
    for words, name in (
        ("memory of the fullest rank, highest (GiB)", "train/memory_rss_gib"),
        ("GPU memory, highest (GiB)", "train/memory_allocated_gib"),
    ):
        add(words, sensible, [max(_finite(run, name), default=math.nan) for run in found])
    add("parameters", magnitude, [number(run.evaluation, "pruned", "parameters") for run in found])
    for words, name in (
        ("FID, whole set", "fid"),
        ("FID, validation split", "fid_validation"),
        ("KID, whole set", "kid"),
        ("sFID", "sfid"),
        ("Inception score", "inception_score"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        add(words, lambda v: sensible(v, 4), [number(run.evaluation, "pruned", name) for run in found])
    add("class accuracy", percent, [number(run.evaluation, "pruned", "class_accuracy") for run in found])
    batches = dict.fromkeys(b for run in found for b in _object(run.evaluation.get("speedup")))
    for batch in batches:
        speedups = [number(run.evaluation, "speedup", batch) for run in found]
        add(f"speed-up, batch {batch}", lambda v: f"{v:.2f} ×", speedups)
    return rows


def differing_settings(runs: Mapping[str, RunFolder]) -> list[tuple[str, ...]]:
    """Rows of the settings that are not the same in all runs; a dash where a run does not have one."""
    configs = [dict(flattened(_config(run))) for run in runs.values()]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, *(config.get(name, MISSING) for config in configs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in NOT_COMPARED]


def _settings(runs: Mapping[str, RunFolder]) -> Markup:
    known = [run for run in runs.values() if run.config]
    rows = differing_settings(runs) if len(known) > 1 else []
    nothing = "All settings are the same." if len(known) > 1 else "Fewer than two runs have kept their settings."
    shown = table(("", *runs), rows, class_="many") if rows else tag("p", nothing)
    return tag("section", tag("h2", "Settings that differ"), shown)


def _decisions(runs: Mapping[str, RunFolder]) -> Markup | None:
    by_run = [{d.check: d for d in run.decisions} for run in runs.values()]
    checks = sorted({check for decisions in by_run for check in decisions})
    if not checks:
        return None
    rows = [(f"check {check}", *(_decided(decisions.get(check)) for decisions in by_run)) for check in checks]
    kept = [run.decisions[-1] if run.decisions else None for run in runs.values()]
    rows.append(("blocks at the end", *(MISSING if d is None else blocks_text(_left(d)) for d in kept)))
    return tag("section", tag("h2", "Decisions"), table(("", *runs), rows, class_="many"))


def _decided(decision: Decision | None) -> str:
    if decision is None:
        return MISSING
    gone = f"{'would remove' if decision.score_only else 'removed'} {blocks_text(decision.dropped)}"
    depths = f"depth {len(decision.kept_before)} → {decision.depth}"
    return f"step {decision.step:,}: {gone}; {depths} ({tables.how(decision)}, {decision.criterion})"


def _left(decision: Decision) -> list[int]:
    return [b for b in decision.kept_before if b not in decision.removed]


def _samples(runs: Mapping[str, RunFolder]) -> Markup | None:
    shown = []
    for name, run in runs.items():
        newest = [p for p in run.samples if not p.name.startswith("base_")][-1:]
        for path in newest:
            data = path.read_bytes()
            if png_width(data) is not None and len(data) < 4_000_000:
                shown.append(figure(data, f"Last samples of {name}", f"{name}: {path.name}"))
    return tag("section", tag("h2", "Last samples"), tag("div", *shown, class_="pair")) if shown else None


def _config(run: RunFolder) -> dict[str, Any]:
    try:
        return _object(read_yaml(run.config))
    except (yaml.YAMLError, RecursionError) as error:
        run.problems.append(f"config.yaml is damaged ({' '.join(str(error).split())[:200]}) and left out.")
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(run: RunFolder, name: str) -> list[float]:
    return [v for v in series(run.metrics, name)[1] if math.isfinite(v)]


def _last(run: RunFolder, name: str) -> tuple[float, float]:
    """Step and value of the last finite figure; NaN without one."""
    steps, values = series(run.metrics, name)
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    return pairs[-1] if pairs else (math.nan, math.nan)


def _depth(run: RunFolder) -> float:
    if run.decisions:
        return run.decisions[-1].depth
    return _last(run, "train/depth")[1]
