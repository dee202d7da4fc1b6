"""The rows of the fault table: each hits a real training with one fault, mends it, and looks at what is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from entprune_ds.bad_steps import FILE
from entprune_ds.config import load_config
from entprune_ds.data.builtin import write_digits
from entprune_ds.engine.checkpoint import step_folders
from tools.poison import poison
from tools.trials import Trial, Unavailable, assert_same_end, killed_at_the_end

HIT = 25
"""Step after which a fault comes: checkpoints and removals lie behind."""


@dataclass(frozen=True)
class Row:
    """What one fault has cost."""

    sent: str
    """What was done to the run."""
    detect: float | None
    """Seconds from the fault to the end of the job, or to the line that tells; None when nothing has to be noticed."""
    recover: float | None
    """Seconds from the same command to the first step beyond the one reached before; None: it never stopped."""
    repeated: int
    """Steps that were trained a second time."""
    then: str
    """What happened, in a few words."""


class Bench:
    """Folder of the trials, with their data and the undisturbed run."""

    def __init__(self, root: Path):
        self.root, self.data = root, root / "data"
        if not self.data.exists():
            write_digits(self.data, shard_size=64, seed=0)

    @cached_property
    def whole(self) -> Trial:
        """The run that nothing happens to."""
        trial = Trial(self.root, "whole", self.data)
        trial.start()
        assert trial.wait_end() == 0, trial.text[-3000:]
        return trial

    def trial(self, name: str, *more: str, **options) -> Trial:
        """A run in a folder of its own."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return Trial(folder, "run", options.pop("data", self.data), *more, **options)


def mend_nothing() -> None:
    """The fault has left nothing to repair."""


def struck(
    trial: Trial, whole: Trial, sent: str, strike: Callable[[], object], says: str, then: str,
    mend: Callable[[], object] = mend_nothing,
) -> Row:  # fmt: skip
    """Hit a running job, wait for its end, mend, start the same command, and compare with the undisturbed run.

    Args:
        strike: the fault.
        says: what the job has to say when it ends.
    """
    with killed_at_the_end(trial):
        trial.start()
        trial.wait_for_step(HIT)
        strike()
        start = time.monotonic()
        assert trial.wait_end() != 0, trial.text[-3000:]
        detect = time.monotonic() - start
        assert re.search(says, trial.text), f"{says} is missing in\n{trial.text[-3000:]}"
        mend()
        return went_on(trial, whole, sent, detect, then)


def went_on(
    trial: Trial, whole: Trial, sent: str, detect: float | None, then: str, tells: str = ""
) -> Row:  # fmt: skip
    """Start the same command and let it end, like the undisturbed run.

    Args:
        tells: line of the new start from which the fault is known; then this is the time to detect.
    """
    reached, start = trial.reached(), trial.start()
    if tells:
        detect = trial.wait_for_text(tells) - start
    recover = trial.wait_for_step(reached + 1) - start
    resumed = re.search(r"resumed from .*: step (\d+),", trial.text)
    assert resumed is not None, trial.text[-3000:]
    assert trial.wait_end() == 0, trial.text[-3000:]
    assert_same_end(trial, whole)
    return Row(sent, detect, recover, reached - int(resumed[1]), then)


def kill_rank(bench: Bench) -> Row:
    """One rank is gone at once."""
    trial = bench.trial("kill_rank")
    strike = lambda: os.kill(trial.ranks[1], signal.SIGKILL)  # noqa: E731
    then = "the launcher ends the other rank; the same command resumes"
    says = r"rank 0 lost contact with another rank .* the same command resumes|exits with return code = -9"
    return struck(trial, bench.whole, "SIGKILL to rank 1", strike, says, then)


def stop_rank(bench: Bench) -> Row:
    """One rank stands still and keeps all its connections."""
    trial = bench.trial("stop_rank", "run.timeout_seconds=60")
    strike = lambda: os.kill(trial.ranks[1], signal.SIGSTOP)  # noqa: E731
    says = r"made no progress for 60 s .*Stacks of all threads: .*rank_00000\.txt"
    then = "the other rank leaves its stacks and ends after run.timeout_seconds=60; the same command resumes"
    row = struck(trial, bench.whole, "SIGSTOP to rank 1", strike, says, then)
    assert "in one_step" in (trial.run / "stacks" / "rank_00000.txt").read_text()
    return row


def corrupt_checkpoint(bench: Bench) -> Row:
    """Bytes of the newest checkpoint change on the disk while nobody looks."""
    trial, whole = bench.trial("corrupt_checkpoint"), bench.whole
    with killed_at_the_end(trial):
        trial.start()
        trial.wait_for_step(HIT)
        trial.kill()
        newest = step_folders(trial.run / "checkpoints")[-1]
        with next(newest.glob("*.safetensors")).open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(byte ^ 0xFF for byte in file.read(50)))
        sent, then = "50 bytes of a file of the newest checkpoint inverted", "the next start uses the one before it"
        tells = f"checkpoint {newest.name} is damaged and is not used"
        return went_on(trial, whole, sent, None, then, tells)


def truncate_shard(bench: Bench) -> Row:
    """Shards of the training data are cut off while they are read."""
    data = bench.root / "truncate_shard_data"
    shutil.copytree(bench.data, data)
    trial, shards = bench.trial("truncate_shard", "data.shuffle_buffer=16", data=data), sorted(data.glob("train/*.tar"))
    whole = bench.trial("truncate_shard_whole", "data.shuffle_buffer=16")
    whole.start()
    assert whole.wait_end() == 0, whole.text[-3000:]

    def strike() -> None:
        for shard in shards:
            os.truncate(shard, 2000)

    def mend() -> None:
        for shard in shards:
            shutil.copy(bench.data / "train" / shard.name, shard)

    sent, says = "all training shards cut to 2000 bytes", r"step \d+: .*shard-\d+\.tar"
    then = "the job ends with the name of the shard; copied again, the same command resumes"
    return struck(trial, whole, sent, strike, says, then, mend)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own, for tests that run as root: nothing else can be filled or made read-only.

    Raises:
        Unavailable: mounting is not allowed.
    """
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        raise Unavailable("needs permission to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write to a file until the disk is full, to the last byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def full_disk(bench: Bench) -> Row:
    """The disk of the run folder fills up."""
    trial = bench.trial("full_disk")
    with small_disk(trial.run.parent, 32):
        trial.output = bench.root / "full_disk.log"
        ballast = trial.run.parent / "ballast"
        then = "one error with the file and the remedy; with space again, the same command resumes"
        return struck(
            trial, bench.whole, "the file system of the run folder filled to the last byte", lambda: fill(ballast),
            r"No space left on device(?s:.*)Free space", then, ballast.unlink,
        )  # fmt: skip


def read_only_folder(bench: Bench) -> Row:
    """The file system of the run folder comes back read-only."""
    trial, whole = bench.trial("read_only"), bench.whole
    with small_disk(trial.run.parent, 64), killed_at_the_end(trial):
        trial.output = bench.root / "read_only.log"
        trial.start()
        trial.wait_for_step(HIT)
        trial.kill()
        remount = ["mount", "-o", "remount,ro", str(trial.run.parent)]
        subprocess.run(remount, check=True)
        start = trial.start()
        assert trial.wait_end() == 2, trial.text[-3000:]
        detect = time.monotonic() - start
        assert "cannot be written" in trial.text and "Read-only file system" in trial.text
        subprocess.run([*remount[:2], "remount,rw", remount[3]], check=True)
        sent = "SIGKILL to all, then the file system remounted read-only"
        then = "the next start is refused; writable again, the same command resumes"
        return went_on(trial, whole, sent, detect, then)


def nan_loss(bench: Bench) -> Row:
    """Three batches in a row make the loss infinite; a second run of the same is killed on the way."""
    steps, data = [HIT, HIT + 1, HIT + 2], bench.root / "nan_loss_data"
    poison(load_config(bench.trial("nan_loss").words), data / "train", steps)
    whole, trial = (bench.trial(name, "train.bad_steps=3", data=data) for name in ("nan_loss", "nan_loss_killed"))
    whole.start()
    assert whole.wait_end() == 0, whole.text[-3000:]
    bad = [json.loads(line) for line in (whole.run / FILE).read_text().splitlines()]
    assert [row["step"] for row in bad] == steps and all(row["keys"] and row["shards"] for row in bad)
    assert "went back to step 20 (roll-back 1 of at most 3)" in whole.text
    with killed_at_the_end(trial):
        trial.start()
        trial.wait_for_text("went back to step 20")
        os.kill(trial.ranks[0], signal.SIGKILL)
        assert trial.wait_end() != 0
        went_on(trial, whole, "", None, "")
    again = next(row["time"] for row in whole.rows() if row["step"] == HIT + 3 and "train/loss" in row)
    sent = "finite latents of 1e30 in the batches of three steps"
    then = (
        "they are left out; with train.bad_steps=3 the run then goes back in its processes, with the data that follow"
    )
    return Row(sent, None, again - bad[-1]["time"], HIT + 2 - 20, then)


def no_wandb(bench: Bench) -> Row:
    """The server of Weights & Biases takes connections and never answers."""
    whole = bench.whole
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"WANDB_MODE": None, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
        trial = bench.trial("no_wandb", "monitor.wandb=true", environment=environment)
        with killed_at_the_end(trial):
            start = trial.start()
            told = trial.wait_for_text("Weights & Biases could not start")
            first = trial.wait_for_step(1)
            assert trial.wait_end() == 0, trial.text[-3000:]
    assert_same_end(trial, whole)
    then = "one warning, the run is kept offline for `wandb sync`; metrics.jsonl is whole"
    return Row("a W&B server that never answers, from the start", told - start, first - told, 0, then)


def clock_jump(bench: Bench) -> Row:
    """The clock of the machine leaps a month ahead, then a year back."""
    trial, whole = bench.trial("clock_jump", module="tests.workers.clocks"), bench.whole
    with killed_at_the_end(trial):
        trial.start()
        assert trial.wait_end() == 0, trial.text[-3000:]
    times = [row["time"] for row in trial.rows()]
    assert max(times) - min(times) > 300 * 86400  # the fault was there
    assert_same_end(trial, whole)
    then = "nothing: all time-outs are on the monotonic clock"
    return Row("time.time() leaps a month ahead, later a year back", None, None, 0, then)


def two_jobs(bench: Bench) -> Row:
    """The same command a second time while the first one runs; then the first is killed and leaves its lock."""
    patient = "run.timeout_seconds=3600"
    trial, whole = bench.trial("two_jobs", patient), bench.whole
    second = Trial(trial.run.parent, "run", bench.data, patient)
    second.output = trial.run.parent / "second.log"
    with killed_at_the_end(trial, second):
        trial.start()
        trial.wait_for_step(2)
        for pid in trial.ranks:  # on a slow machine it would end before the second one looks
            os.kill(pid, signal.SIGSTOP)
        start = second.start()
        assert second.wait_end() == 2, second.text[-3000:]
        detect = time.monotonic() - start
        for pid in trial.ranks:
            os.kill(pid, signal.SIGCONT)
        assert f"{trial.run} is in use by host {socket.gethostname()}, process {trial.ranks[0]}" in second.text
        assert "Wait for it, stop it, or choose another" in second.text
        trial.wait_for_step(HIT)
        trial.kill()
        assert f"process {trial.ranks[0]}" in (trial.run / "lock").read_text()  # stale: its owner is gone
        then = "the second is refused with the owner's name; the stale lock of a killed job is taken over"
        return went_on(trial, whole, "the same command twice; then SIGKILL to all of the first", detect, then)


ROWS: dict[str, Callable[[Bench], Row]] = {
    "a rank is killed": kill_rank,
    "a rank is stopped": stop_rank,
    "the newest checkpoint is corrupt": corrupt_checkpoint,
    "a shard is truncated": truncate_shard,
    "the disk is full": full_disk,
    "the run folder is read-only": read_only_folder,
    "the loss is infinite or NaN": nan_loss,
    "W&B is unreachable": no_wandb,
    "the clock jumps": clock_jump,
    "two jobs, one run folder": two_jobs,
}
