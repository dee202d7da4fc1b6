"""Everything a report needs from a run folder, read once, with a list of what is missing or damaged."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plain_json import parse_json
from .files import Lines, read_json_lines
from .records import Decision, decisions_of

WHAT_FOR = {
    "metrics.jsonl": "no loss curve",
    "decisions.jsonl": "no pruning check was recorded",
    "evaluation.json": "quality and speed were not measured (`entprune-ds evaluate`)",
    "env.json": "the command and the versions are unknown",
    "config.yaml": "the settings are unknown",
}


@dataclass(frozen=True)
class RunFolder:
    """What was found. Absent parts are empty; `problems` says so in words."""

    path: Path
    metrics: list[dict]
    decisions: list[Decision]
    evaluation: dict[str, Any]
    env: dict[str, Any]
    summary: dict[str, Any]
    config: str
    samples: list[Path]
    """PNG files of samples/ by the numbers in their names; names without a number last."""
    problems: list[str] = field(default_factory=list)


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder; nothing in it can make this fail except the folder itself.

    Raises:
        ValueError: there is no such folder.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder. Give a run folder, such as runs/NAME.")
    problems: list[str] = []
    metrics = _lines(path / "metrics.jsonl", problems)
    lines = _lines(path / "decisions.jsonl", problems)
    decisions, refused = decisions_of(lines.rows)
    if refused:
        problems.append(f"decisions.jsonl: {refused} {_lines_word(refused)} not a decision and left out.")
    samples = sorted((path / "samples").glob("*.png"), key=_natural)
    if not samples:
        problems.append("samples/*.png are missing: no pictures (`entprune-ds sample`).")
    evaluation = _object(path / "evaluation.json", problems)
    if evaluation and _of_another_model(evaluation, _object(path / "model" / "config.json", [])):
        problems.append("evaluation.json is of another model than the one in model/: run `entprune-ds evaluate` again.")
    return RunFolder(
        path=path,
        metrics=metrics.rows,
        decisions=decisions,
        evaluation=evaluation,
        env=_object(path / "env.json", problems),
        summary=_object(path / "summary.json", problems),
        config=_text(path / "config.yaml", problems),
        samples=samples,
        problems=problems,
    )


def _of_another_model(evaluation: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether blocks or step of what was measured are not those of the export, which a later training has replaced."""
    measured = evaluation.get("pruned")
    both = (
        [(measured.get(key), model.get(key)) for key in ("kept_blocks", "step")] if isinstance(measured, dict) else []
    )
    return any(None not in pair and pair[0] != pair[1] for pair in both)


def _lines(path: Path, problems: list[str]) -> Lines:
    try:
        lines = read_json_lines(path)
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
        return Lines([], 0, True)
    if not lines.found:
        problems.append(f"{path.name} is missing: {WHAT_FOR[path.name]}.")
    if lines.damaged:
        problems.append(f"{path.name}: {lines.damaged} {_lines_word(lines.damaged)} damaged and left out.")
    return lines


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    if not text:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        problems.append(f"{path.name} is damaged ({error}) and left out.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a JSON object and is left out.")
        return {}
    return value


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        if path.name in WHAT_FOR:
            problems.append(f"{path.name} is missing: {WHAT_FOR[path.name]}.")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
    return ""


def _lines_word(count: int) -> str:
    return "line is" if count == 1 else "lines are"


def _natural(path: Path) -> tuple[bool, list[tuple[int, int, str]]]:
    """Numbers inside names sort by value, and names without a number come last: step_2 < step_10 < final.

    Within a step, "before" a removal precedes "after", which the alphabet would turn round.
    """
    parts = [p for p in re.split(r"([0-9]+)", path.stem.replace("after", "before~")) if p]
    return not any(p.isdigit() for p in parts), [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]
