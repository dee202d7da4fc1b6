"""A tiny training with two removals that is started by the same command again and again, whatever has hit it.

Shared by the fault table, the soak and their tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from entprune_ds.engine.checkpoint import range_reader, read_checkpoint
from entprune_ds.engine.state import KEYS

ROOT = Path(__file__).parents[1]
LAUNCHER = str(Path(sys.executable).parent / "deepspeed")
STEPS = 60
TAIL = 20_000
"""Bytes of metrics.jsonl in which the last steps lie."""
SETTINGS = [
    "preset=digits_prune", "model.depth=4", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=16",
    "train.micro_batch_size=4", f"train.num_steps={STEPS}", "train.validate_every=0", "train.checkpoint_every=10",
    "train.keep_checkpoints=3", "train.warmup_steps=0", "prune.target_depth=2", "prune.num_checks=2",
    "prune.end_step=40", "prune.max_blocks_per_check=1", "prune.criterion=loss", "score.draws=64",
    "score.batch_size=32", "prune.ntk_samples=4", "prune.ntk_repeats=1", "prune.zico_batches=2",
    "prune.zico_batch_size=4", "sample.grid=4", "sample.num_steps=2", "monitor.log_every=1", "monitor.wandb=false",
]  # fmt: skip


class Unavailable(Exception):
    """This machine does not allow the fault; the message says what is missing."""


class Trial:
    """One run folder and the command that works in it.

    Args:
        root: folder of the run folder and of the output.
        name: of the run.
        data: folder with train/ shards.
        more: settings beside SETTINGS.
        module: what the launcher runs.
        environment: beside that of this process; None takes a variable away.
    """

    def __init__(
        self, root: Path, name: str, data: Path, *more: str, module: str = "entprune_ds.cli.train",
        environment: dict[str, str | None] | None = None,
    ):  # fmt: skip
        self.run, self.output, self.module = root / name, root / f"{name}.log", module
        self.words = [*SETTINGS, f"data.shards={data}/train", f"run.root={root}", f"run.name={name}", *more]
        wanted: dict[str, str | None] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        wanted |= {"WANDB_MODE": "offline", **(environment or {})}
        self.environment = {name: value for name, value in wanted.items() if value is not None}
        self.process: subprocess.Popen | None = None
        self.begin = 0
        """Where the output of the newest start begins."""

    def start(self) -> float:
        """Start the command on two ranks; returns the monotonic time."""
        self.begin = self.output.stat().st_size if self.output.exists() else 0
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [LAUNCHER, "--num_gpus", "2", "--master_port", str(port), "--module", self.module, *self.words]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores and passes it on
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=self.environment, cwd=ROOT, start_new_session=True
            )
        return time.monotonic()

    @property
    def text(self) -> str:
        """What the newest start has printed."""
        if not self.output.exists():
            return ""
        return self.output.read_bytes()[self.begin :].decode(errors="replace")

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks of the newest start."""
        return [int(pid) for pid in re.findall(r"process (\d+) spawned", self.text)]

    def losses(self) -> dict[int, float]:
        """Loss by step, as metrics.jsonl has it."""
        return {row["step"]: row["train/loss"] for row in self.rows() if "train/loss" in row}

    def rows(self) -> list[dict]:
        """Whole lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def reached(self) -> int:
        """The last step that was logged; reads the end of the file only."""
        path = self.run / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        rows = [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]
        return max((row["step"] for row in rows if "train/loss" in row), default=0)

    def removals(self) -> list[dict]:
        """Decisions that removed something."""
        lines = (self.run / "decisions.jsonl").read_text().splitlines()
        return [decision for line in lines if (decision := json.loads(line))["dropped"]]

    def wait_for_step(self, step: int, seconds: float = 1200) -> float:
        """Wait until a step is logged; returns the monotonic time."""
        return self._wait(lambda: self.reached() >= step, f"step {step}", seconds)

    def wait_for_text(self, text: str, seconds: float = 1200) -> float:
        """Wait until the newest start has printed a text; returns the monotonic time."""
        return self._wait(lambda: text in self.text, repr(text), seconds)

    def _wait(self, there: Callable[[], bool], what: str, seconds: float) -> float:
        assert self.process is not None
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"{what} did not come in {seconds:.0f} s:\n{self.text[-3000:]}"
            assert self.process.poll() is None or there(), f"ended without {what}:\n{self.text[-3000:]}"
            time.sleep(0.02)
        return time.monotonic()

    def wait_end(self, seconds: float = 1200) -> int:
        """Exit status of the command, when it and its ranks are gone; whatever is left at the limit is killed."""
        assert self.process is not None
        try:
            status = self.process.wait(seconds)
            end = time.monotonic() + 60
            while left := self.living():
                assert time.monotonic() < end, f"{left} have outlived their launcher"
                time.sleep(0.02)
            return status
        finally:
            self.kill()

    def living(self) -> list[psutil.Process]:
        """Launcher and ranks of the newest start that run or are stopped; known by their words, numbers come again."""
        found = []
        for pid in (self.process.pid, *self.ranks) if self.process is not None else ():
            try:
                process = psutil.Process(pid)
                found += [process] if set(self.words) <= set(process.cmdline()) else []
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """End everything of the newest start, if anything is left: launcher, ranks and their children."""
        if self.process is None:
            return
        family = list[psutil.Process]()
        for process in self.living():
            with suppress(psutil.NoSuchProcess):
                family += [*process.children(recursive=True), process]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=60)  # files are open until they are gone
        self.process.wait()


@contextmanager
def killed_at_the_end(*trials: Trial) -> Iterator[None]:
    """No process of a trial outlives this."""
    try:
        yield
    finally:
        for trial in trials:
            trial.kill()


def different_state(a: Path, b: Path) -> list[str]:
    """Names "KEY/PARAMETER" in which two checkpoints differ, to the bit."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    shapes, others = first.manifest["shapes"], second.manifest["shapes"]
    if shapes != others:
        return [name for name in shapes | others if shapes.get(name) != others.get(name)]
    read, other, found = range_reader(first), range_reader(second), []
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        mine, yours = read(name, 0, size), other(name, 0, size)
        found += [f"{key}/{name}" for key in KEYS if not torch.equal(mine[key], yours[key])]
    return found


def assert_same_end(trial: Trial, whole: Trial, steps: int = STEPS) -> None:
    """A run that has ended and the undisturbed one hold the same: state, losses of all steps, decisions."""
    last = f"checkpoints/step_{steps:08d}"
    different = different_state(trial.run / last, whole.run / last)
    assert not different, f"the final state differs in {different[:5]} and {len(different)} in all"
    assert trial.losses() == whole.losses() and len(trial.losses()) == steps
    assert (trial.run / "decisions.jsonl").read_text() == (whole.run / "decisions.jsonl").read_text()
