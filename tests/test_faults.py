"""Real signals to real ranks under the real launcher: the job ends clearly, and the same command finishes it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import free_port, run_ranks
from tests.test_training import equal_state, losses, words

LAUNCHER = str(Path(sys.executable).parent / "deepspeed")


def launch(arguments: list[str], log: Path, num_ranks: int = 2) -> subprocess.Popen:
    """Start a training under the deepspeed launcher, as a user would."""
    command = [LAUNCHER, "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command += ["--module", "entprune_ds.cli.train", *arguments]
    with open(log, "ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until the run has logged a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached (exit status {process.poll()})")


def finish(process: subprocess.Popen, seconds: float) -> int:
    """Exit status within a limit; whatever is left is killed."""
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rank_pids(log: Path) -> list[int]:
    """Process ids of the ranks, from the launcher's output."""
    return [int(pid) for pid in re.findall(r"process (\d+) spawned", log.read_text())]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    root = tmp_path_factory.mktemp("undisturbed")
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, root, "whole", *LONG)])
    return root / "whole"


LONG = ["train.num_steps=60", "prune.end_step=40", "train.checkpoint_every=10", "train.validate_every=0"]


@pytest.mark.parametrize(
    ("victim", "number"),
    [(1, signal.SIGKILL), pytest.param(0, signal.SIGKILL, marks=pytest.mark.full),
     pytest.param("launcher", signal.SIGINT, marks=pytest.mark.full)],
)  # fmt: skip
def test_killing_one_process_ends_the_job_and_the_same_command_resumes(digits, tmp_path, undisturbed, victim, number):
    run, log = tmp_path / "killed", tmp_path / "log"
    arguments = words(digits, tmp_path, "killed", *LONG)
    process = launch(arguments, log)
    wait_for_step(run, 25, process)
    target = process.pid if victim == "launcher" else rank_pids(log)[victim]
    os.kill(target, number)
    start = time.monotonic()
    assert finish(process, seconds=60) != 0
    assert time.monotonic() - start < 60
    for pid in rank_pids(log):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    text = log.read_text()
    assert "the same command resumes from it" in text
    assert re.search(r"newest checkpoint is .*step_0000002\d|newest checkpoint is .*step_0000003\d", text)
    assert finish(launch(arguments, log), seconds=200) == 0
    assert losses(run) == losses(undisturbed)
    assert equal_state(run / "checkpoints/step_00000060", undisturbed / "checkpoints/step_00000060")
    assert (run / "decisions.jsonl").read_text() == (undisturbed / "decisions.jsonl").read_text()


def test_a_run_folder_in_use_is_refused(digits, tmp_path):
    """Rank 0 cannot take the lock: every rank ends with the same message, naming the owner."""
    import fcntl

    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy" / "lock", "w") as lock:
        lock.write("host elsewhere, process 1\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = launch(words(digits, tmp_path, "busy"), tmp_path / "log")
        assert finish(process, seconds=100) != 0
    text = (tmp_path / "log").read_text()
    assert "is in use by host elsewhere, process 1" in text
    assert not (tmp_path / "busy" / "checkpoints").exists()
