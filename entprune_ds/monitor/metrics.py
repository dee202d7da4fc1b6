"""The monitor of a run: metrics.jsonl, always, and Weights & Biases beside it when asked for.

metrics.jsonl is the plain copy: one JSON object a line, {"step", "time" (epoch seconds), "group/name": number}.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import write_bytes
from ..config import Config
from ..logs import get_logger
from ..plain_json import parse_json
from .interface import Monitor, NullMonitor
from .records import decision_of, step_of
from .sender import QueuedMonitor

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"


def open_monitor(config: Config, run_dir: Path, enabled: bool) -> Monitor:
    """The monitor of this process: files and W&B where `enabled` (rank 0), a null object elsewhere.

    Args:
        config: the resolved config; `config.monitor.wandb` switches W&B, whose failures are warnings.
        run_dir: existing run folder. On a resume call `rewind_metrics` first.
        enabled: whether this process logs.

    Raises:
        OSError: the run folder cannot be written.
    """
    if not enabled:
        return NullMonitor()
    if not config.monitor.wandb:
        return RunMonitor(run_dir, NullMonitor())
    from .wandb_run import FINISH_SECONDS, end_service, start_wandb  # here, so that other ranks load no matplotlib

    longest = min(FINISH_SECONDS, config.run.timeout_seconds / 2)  # the other ranks wait for this one
    return RunMonitor(
        run_dir,
        QueuedMonitor(lambda: start_wandb(config, run_dir), get_logger(), longest, end_service, run_dir / "wandb"),
    )


class RunMonitor:
    """Writes metrics.jsonl, flushed line by line, and passes everything on to a client."""

    def __init__(self, run_dir: Path, client: Monitor):
        self.client = client
        self.path = run_dir / METRICS_FILE
        cut_short = _ends_in_a_half_line(self.path)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by finish)
        if cut_short:
            self.file.write("\n")  # else the first new line would be lost with the half one

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. NaN and infinities become null in the file.

        Raises:
            TypeError: a value is not a plain int or float (a tensor needs `.item()`, off the hot path).
            ValueError: a name is reserved.
        """
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            if name in line:
                raise ValueError(f"metric `{name}` would overwrite a field of the line. Name it group/name.")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"metric `{name}` must be a plain int or float, got {type(value).__name__}.")
            line[name] = value if isinstance(value, int) else _finite(value)
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()
        self.client.log(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """Pass a PNG file on; the file itself is the plain copy."""
        self.client.image(step, name, path)

    def decision(self, decision: Mapping[str, Any]) -> None:
        """Log prune/depth and prune/blocks_removed, and pass the decision on (decisions.jsonl is its plain copy).

        Raises:
            ValueError: not a decision, naming the key.
        """
        checked = decision_of(decision)
        self.log(checked.step, {"prune/depth": checked.depth, "prune/blocks_removed": len(checked.removed)})
        self.client.decision(decision)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Pass final figures on (summary.json is their plain copy)."""
        self.client.summary(values)

    def artifact(self, folder: Path, name: str, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """Pass a folder on."""
        self.client.artifact(folder, name, kind, facts)

    def finish(self, exit_code: int = 0, hurry: bool = False) -> None:
        """Close the file and the client."""
        self.file.close()
        self.client.finish(exit_code, hurry)


def metrics_size(run_dir: Path) -> int:
    """Bytes of metrics.jsonl so far; the monitor flushes every line."""
    path = run_dir / METRICS_FILE
    return path.stat().st_size if path.is_file() else 0


def rewind_metrics(run_dir: Path, step: int, size: int | None = None) -> int:
    """Move what a resume will write again to metrics.superseded.jsonl.

    These are the lines after `step`, and those from byte `size` on.

    A half-written last line is dropped; other damaged lines stay where they are, for the report to count. Later lines
    are appended and synced before the shorter file replaces the old one, so a kill in between loses nothing.

    Args:
        run_dir: the run folder.
        step: optimizer steps that are done.
        size: length of metrics.jsonl when the checkpoint was written (`metrics_size`): a check logs at the step of the
            checkpoint before it. None keeps all lines of `step`.

    Returns:
        Number of lines moved.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return 0
    text = path.read_bytes()
    whole, _, half = text.rpartition(b"\n")
    kept: list[bytes] = []
    moved: list[bytes] = []
    begin = 0
    for line in whole.split(b"\n") if whole else []:
        again = _step_or_first(line) > step or (size is not None and begin >= size)
        (moved if again else kept).append(line + b"\n")
        begin += len(line) + 1
    if moved:
        superseded = run_dir / SUPERSEDED_FILE
        separator = b"\n" if _ends_in_a_half_line(superseded) else b""
        with open(superseded, "ab") as file:
            file.writelines([separator, *moved])
            file.flush()
            os.fsync(file.fileno())
    if moved or half:
        write_bytes(path, b"".join(kept))
    return len(moved)


def _step_or_first(line: bytes) -> float:
    """Step of a line; minus infinity for a damaged one."""
    try:
        step = step_of(parse_json(line.decode("utf-8", errors="replace")))
    except ValueError:
        step = None
    return -math.inf if step is None else step


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _ends_in_a_half_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
