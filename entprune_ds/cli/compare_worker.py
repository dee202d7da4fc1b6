"""A worker of `entprune-ds compare`: one process that trains and measures one row after another."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from entprune_ds import comm
from entprune_ds.atomic import write_text
from entprune_ds.cli.compare_base import base_config, base_path, further_base
from entprune_ds.cli.compare_plan import Row, rows_of, studies
from entprune_ds.cli.compare_row import Bench, base_unfinished, missing, open_bench, read_result, run_base, run_row
from entprune_ds.cli.compare_sources import sources
from entprune_ds.config import Config
from entprune_ds.locks import FolderBusy, locked
from entprune_ds.trainer import train

Say = Callable[[str, str], None]
"""say(event, row): tells the parent what this worker does."""


def failure_path(out: Path, name: str) -> Path:
    """Marks a row that failed in this call of the command."""
    return out / "failures" / f"{name}.json"


def log_path(out: Path, name: str) -> Path:
    """What a row printed while it was trained."""
    return out / "logs" / f"{name}.txt"


def work(config: Config, part: str) -> None:
    """Train the base (part "base"), or every row that is not finished, failed or in the hands of another worker."""
    comm.init(config.run.timeout_seconds)  # once: each training joins it
    out, say = Path(config.compare.out), _announcer()
    if part == "base":
        while not (base_path(config).is_dir() or failure_path(out, "base").is_file()):
            attempt(out, "base", lambda: train(base_config(config), []), lambda: not base_path(config).is_dir(), say)
            time.sleep(1)  # another command may be training it
        return
    bench = open_bench(config, out, base_path(config))
    attempt(out, "base", lambda: run_base(bench), lambda: base_unfinished(config, read_result(out, "base")), say)
    rows = rows_of(studies(config, bench.model))
    for seed in dict.fromkeys(row.base for row in rows if row.base is not None):
        _further_base(bench, seed, say)
    for row in rows:
        while row.base is not None and not _further_base(bench, row.base, say):
            time.sleep(1)  # another worker trains it
        attempt(out, row.name, _task(bench, row), _unfinished(bench, row), say)


def _further_base(bench: Bench, seed: int, say: Say) -> bool:
    """Train a further base, unless another worker does; returns whether it is there, or has failed."""
    name, path = f"base_{seed}", further_base(bench.out, seed)
    settings = base_config(bench.config, seed)
    settings = replace(settings, model=replace(bench.model, weights=""))  # the architecture of the common base
    attempt(bench.out, name, lambda: train(settings, []), lambda: not path.is_dir(), say)
    return path.is_dir() or failure_path(bench.out, name).is_file()


def _task(bench: Bench, row: Row) -> Callable[[], None]:
    return lambda: run_row(bench, row, sources(bench.config, row))


def _unfinished(bench: Bench, row: Row) -> Callable[[], bool]:
    return lambda: bool(missing(row, bench.config.compare, read_result(bench.out, row.name)))


def attempt(out: Path, name: str, task: Callable[[], None], wanted: Callable[[], bool], say: Say) -> None:
    """Do a row unless it is done, has failed, or another worker does it; what it raises is its failure, not ours.

    An error inside the training ends this process instead; the parent then notes the failure.
    """
    if not wanted() or failure_path(out, name).is_file():
        return
    with contextlib.suppress(FolderBusy), locked(out / "locks" / name, "`compare.out`"):
        if not wanted():
            return  # another worker has just finished it
        say("start", name)
        with _into(log_path(out, name)):
            try:
                task()
            except Exception as error:
                traceback.print_exc()
                note_failure(out, name, f"{type(error).__name__}: {error}")
        say("failed" if failure_path(out, name).is_file() else "done", name)


def note_failure(out: Path, name: str, why: str) -> None:
    """Mark a row as failed."""
    path = failure_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"row": name, "why": why, "log": str(log_path(out, name))}))


def _announcer() -> Say:
    """Events go to the standard output that this process was started with, as JSON lines."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")

    def say(event: str, name: str) -> None:
        channel.write(json.dumps({"event": event, "row": name}) + "\n")
        channel.flush()

    return say


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Everything that is printed, by C++ too, goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(log, "a", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for descriptor, old in zip((1, 2), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
