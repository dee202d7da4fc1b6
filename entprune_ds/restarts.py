"""How often a Slurm job has been started again without a newer checkpoint: a crash loop ends after some restarts.

The count lies in the run folder (restarts.json), since neither a requeued job nor its environment remembers anything.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from entprune_ds.atomic import write_text

FILE = "restarts.json"


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """What restarts.json says."""

    job: str
    """Slurm job that the count is about; another job starts from 0."""
    step: int
    """Step of the newest checkpoint when the job was started last; -1: none."""
    count: int
    """Restarts in a row that found no newer checkpoint."""


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint of a run folder, -1 where there is none."""
    latest = folder / "checkpoints" / "latest"
    found = re.fullmatch(r"step_(\d+)", latest.read_text().strip()) if latest.is_file() else None
    return int(found[1]) if found else -1


def begin(folder: Path, job: str, start: int) -> Restarts:
    """Count this start of a job and write it down.

    Args:
        folder: the run folder, made when missing.
        job: its number.
        start: how often Slurm has started it before.

    Raises:
        OSError: the folder cannot be written.
    """
    before = read(folder)
    goes_on = start > 0 and before is not None and before.job == job
    now = Restarts(job=job, step=newest_step(folder), count=next_count(folder) if goes_on else 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(asdict(now)) + "\n")
    return now


def next_count(folder: Path) -> int:
    """What another restart of the same job would count: one more, or 0 when there is a newer checkpoint."""
    before = read(folder)
    return 0 if before is None or newest_step(folder) > before.step else before.count + 1


def is_of(folder: Path, job: str) -> bool:
    """Whether the last start that was counted in a run folder is one of this job: what came since is its own."""
    before = read(folder)
    return before is not None and before.job == job


def read(folder: Path) -> Restarts | None:
    """What the last start has written; None without a sound file."""
    try:
        values = json.loads((folder / FILE).read_text())
        return Restarts(job=str(values["job"]), step=int(values["step"]), count=int(values["count"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def loop_problem(folder: Path, most: int, count: int, logs: Path) -> str | None:
    """What to tell when a job was started `count` times in vain, and that is more than `most`; else None."""
    if count <= most:
        return None
    step = newest_step(folder)
    reached = f"newer than step {step}" if step >= 0 else "at all"
    text = f"{most} restart(s) in a row have brought {folder} no checkpoint {reached}: the job stops here. "
    text += f"{last_error(logs)} Logs: {logs}. When the cause is gone, the same sbatch line goes on "
    return text + "(ENTPRUNE_MAX_RESTARTS sets the limit)."


def last_error(logs: Path) -> str:
    """How the rank has ended that ended first (slurm/env.sh writes it down): the others only lost contact with it."""
    ended = logs / "ended"
    if not ended.is_file():
        return "No rank has said how it ended: Slurm or a node has ended it."
    status, rank, node = ended.read_text().split()
    path = logs / f"rank_{rank}.log"
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return f"Rank {rank} on {node} ended first, with status {status}; its log ends with: {lines[-1][:500]}"
