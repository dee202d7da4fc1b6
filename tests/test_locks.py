"""The lock of a folder: a second job is refused with the name of the first, and a job that is gone holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from entprune_ds.cli.shards import main
from entprune_ds.locks import FolderBusy, locked
from tests.ranks import ROOT, run_ranks

HOLD = """
import sys, time
from pathlib import Path
from entprune_ds.locks import locked
with locked(Path(sys.argv[1]), "`out`"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_a_killed_one_is_taken_over(tmp_path, monkeypatch, capsys):
    with hold(tmp_path / "train") as other:
        assert main([f"out={tmp_path}"]) == 2
        assert list(tmp_path.rglob("*.tar")) == [] and not (tmp_path / "val" / "lock").exists()
        error = capsys.readouterr().err
        assert f"{tmp_path / 'train'} is in use by host {socket.gethostname()}, process {other.pid}. Wait" in error
        assert "another `out`" in error and "rm " not in error
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "train" / "lock").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with locked(tmp_path / "train", "`out`"):
        text = (tmp_path / "train" / "lock").read_text()
    assert text == f"host {socket.gethostname()}, process {os.getpid()}, Slurm job 77\n"
    assert main([f"out={tmp_path}"]) == 0 and list(tmp_path.rglob("lock")) == []


def test_all_ranks_of_an_encoding_hear_that_the_folder_is_in_use(tmp_path):
    with hold(tmp_path) as other:
        texts = run_ranks("tests.workers.locks:refused", 2, folder=str(tmp_path))
        other.kill()
    assert texts == [f"{tmp_path} is in use by host {socket.gethostname()}, process {other.pid}. Wait for it, stop it, "
                     "or choose another `out`."] * 2  # fmt: skip


def test_a_requeued_job_waits_for_the_lock_that_its_dead_node_still_has(tmp_path, monkeypatch):
    """A file server keeps it for a while; here another process does."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with hold(tmp_path) as other:
        (tmp_path / "lock").write_text("host elsewhere, process 12, Slurm job 77\n")
        threading.Timer(1.5, other.kill).start()
        with locked(tmp_path, "`out`"):
            assert other.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ("", True),
        (f"host {socket.gethostname()}, process {os.getppid()}", False),
        (f"host {socket.gethostname()}, process 4194999", True),  # above the largest process id
        ("host elsewhere, process 4194999", False),
        ("host elsewhere, process 4194999, Slurm job 7", False),
        ("host elsewhere, process 4194999, Slurm job 77", True),  # this job, requeued on another node
        ("something else", False),
    ],
)
def test_where_files_have_no_locks_the_named_job_counts(tmp_path, monkeypatch, owner, free):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / "lock").write_text(owner + "\n")
    if free:
        with locked(tmp_path, "`out`"), pytest.raises(FolderBusy), locked(tmp_path, "`out`"):
            raise AssertionError("two jobs hold one lock")
        assert not (tmp_path / "lock").exists()
        return
    with pytest.raises(FolderBusy) as caught, locked(tmp_path, "`out`"):
        raise AssertionError("the lock was taken")
    assert f"is in use by {owner}. Wait for it" in str(caught.value)
    assert ("remove " + str(tmp_path / "lock") in str(caught.value)) == (socket.gethostname() not in owner)
    assert (tmp_path / "lock").read_text() == owner + "\n"
