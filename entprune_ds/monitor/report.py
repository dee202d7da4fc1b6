"""report.html: a run on one self-contained page, built from the files of its folder only.

Figures appear only where they were measured; what is missing or damaged is said at the top.
"""

from __future__ import annotations

import math
import shlex
from datetime import UTC, datetime
from pathlib import Path

from .. import __version__
from ..atomic import write_bytes
from . import plots
from .activity_section import activity_section
from .decision_section import decision_section
from .html import Markup, facts, figure, joined, page, table, tag
from .numbers import sensible
from .quality_section import headline_tiles, quality_section
from .records import MAX_BLOCKS, Decision, number, series
from .run_folder import RunFolder, read_run_folder
from .samples_section import samples_section

REPORT_FILE = "report.html"
MOST_CHECKS = 64
"""Checks shown one by one."""
MEANINGS = {
    "ced": "change of the output entropy when the block is left out (Conditional Entropy Deviation); small goes first",
    "ced_abs": "entropy change summed over output elements as absolute values, so that none cancel; small goes first",
    "loss": "rise of the loss when the block is left out; small goes first",
    "random": "seeded random order",
    "every_other": "evenly spaced blocks go",
    "explicit": "the order is given in the config",
    "recovery_race": "keep-sets recover for a few steps each, and what the best of them lacks goes first",
    "magnitude_l1": "sum of the absolute weights of the block; small goes first",
    "magnitude_l2": "Euclidean norm of the weights of the block; small goes first",
    "taylor": "sum of |weight x gradient of the loss| over the block; small goes first",
    "diff_pruning": "as taylor, of the sum of the losses at the times that are not nearly solved; small goes first",
    "spread_taylor": "diff_pruning weighed against even spacing: what lies outside the best such set goes first",
    "learned": "probability to be kept, learned together with LoRA; blocks outside the likeliest masks go first",
    "combined": "weighted average of the places that other criteria give",
}


def build_report(run_dir: Path) -> Path:
    """Write run_dir/report.html.

    Returns:
        Path of the report.

    Raises:
        ValueError: `run_dir` is not a folder.
        OSError: the report cannot be written; an earlier one is untouched.
    """
    run = read_run_folder(Path(run_dir))
    path = run.path / REPORT_FILE
    write_bytes(path, render(run))
    return path


def render(run: RunFolder) -> bytes:
    """The whole page."""
    problems = list(run.problems)
    sections = [
        samples_section(run.samples, problems),
        _training(run, problems),
        _pruning(run),
        activity_section(run),
        quality_section(run),
        _reproduce(run),
    ]
    notes = [tag("li", p) for p in problems]
    body = joined(
        [
            tag("p", "entprune_ds run report", class_="soft"),
            tag("h1", run.path.resolve().name),
            tag("p", _one_line(run), class_="soft"),
            headline_tiles(run),
            tag("div", tag("b", "Missing or damaged"), tag("ul", *notes), class_="notes") if notes else None,
            *sections,
            tag("footer", f"Written by entprune_ds {__version__} from the files of this run folder."),
        ]
    )
    return page(f"{run.path.resolve().name} · entprune_ds", body)


def _one_line(run: RunFolder) -> str:
    words = []
    steps, _ = series(run.metrics, "train/loss")
    if steps:
        words.append(f"training to step {steps[-1]:,}")
    if run.decisions:
        words.append(f"{len(run.decisions)} pruning checks, criterion {run.decisions[-1].criterion}")
    times = [t for row in run.metrics if 0 < (t := number(row, "time")) < 1e11]
    if times:
        first, last = (datetime.fromtimestamp(t, UTC) for t in (min(times), max(times)))
        end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
        words.append(f"recorded {first:%Y-%m-%d %H:%M} to {end} UTC")
    return " · ".join(words)


def _training(run: RunFolder, problems: list[str]) -> Markup | None:
    depth = figure(plots.depth_over_time(run.decisions, run.metrics), "Depth over training steps")
    loss = figure(plots.loss_curves(run.metrics, run.decisions), "Loss over training steps")
    broken = [s for s, v in zip(*series(run.metrics, "train/loss"), strict=True) if not math.isfinite(v)]
    if broken:
        problems.append(f"The training loss was not finite at {len(broken)} logged steps, first at step {broken[0]:,}.")
    if depth is None and loss is None:
        return None
    marks = "Dashed lines mark removals, with the number of blocks." if any(d.removed for d in run.decisions) else None
    totals = {k: v for k, v in run.summary.items() if not isinstance(v, (dict, list))}
    rows = [(name.replace("_", " "), sensible(v) if isinstance(v, float) else str(v)) for name, v in totals.items()]
    return tag(
        "section",
        *(tag("h2", "Training"), tag("h3", "Depth over time") if depth else None, depth),
        *(tag("h3", "Loss") if loss else None, loss, tag("p", marks, class_="soft") if marks and loss else None),
        *((tag("h3", "Totals"), table((), rows, class_="facts")) if rows else ()),
    )


def _pruning(run: RunFolder) -> Markup | None:
    if not run.decisions:
        return None
    shown = run.decisions[-MOST_CHECKS:]
    maps = [_heat_map(shown, criterion) for criterion in dict.fromkeys(d.scored_by for d in shown)]
    words = [f"{c}: {MEANINGS[c]}. " for c in dict.fromkeys(d.criterion for d in shown) if c in MEANINGS]
    explained = "Colours are standardised within each check: they compare blocks, not checks. Numbers are the scores."
    recorded = number(run.evaluation, "pruned", "original_depth")
    seen = max(b for d in shown for b in (*d.kept_before, 0)) + 1
    depth = max(seen, int(recorded)) if 0 < recorded <= MAX_BLOCKS else seen
    more = f"{len(shown)} of {len(run.decisions)} checks shown." if len(shown) < len(run.decisions) else None
    return tag(
        "section",
        tag("h2", "Pruning"),
        tag("p", *words, class_="soft") if words else None,
        *((tag("h3", "Block scores"), *maps, tag("p", explained, class_="soft")) if any(maps) else ()),
        tag("p", more, class_="soft") if more else None,
        *(decision_section(d, depth) for d in shown),
    )


def _heat_map(decisions: list[Decision], criterion: str) -> Markup | None:
    checks = [d for d in decisions if d.scored_by == criterion]
    return figure(plots.score_heat_map(checks, criterion), f"Scores {criterion}, check by block")


def _reproduce(run: RunFolder) -> Markup | None:
    command = run.env.get("command")
    text = shlex.join(map(str, command)) if isinstance(command, list) else command
    rest = {k: v for k, v in run.env.items() if k != "command"}
    if not (run.env or run.config):
        return None
    return tag(
        "section",
        tag("h2", "How to reproduce"),
        tag("pre", str(text)) if text else tag("p", "The command was not recorded."),
        facts(rest) if rest else None,
        tag("details", tag("summary", "Resolved config"), tag("pre", run.config)) if run.config else None,
    )
