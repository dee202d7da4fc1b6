"""W&B that is slow, hangs or is not there: the real client, real sockets, a real stopped service."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from entprune_ds.config import Config
from entprune_ds.logs import get_logger
from entprune_ds.monitor import metrics, sender, wandb_run
from entprune_ds.monitor.interface import NullMonitor
from tests.test_monitor import decision_row, history, wandb_home, wandb_records, write_run  # noqa: F401
from tests.wandb_server import wandb_server

KEY = "5e" * 20


@pytest.fixture
def said(caplog):
    """What our logger says."""
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


@pytest.fixture
def silent_server():
    """The address of a server that accepts every connection and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        held, stop = [], threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", held
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in held:
            connection.close()


class Slow(NullMonitor):
    """A client whose every row waits for `go`."""

    def __init__(self) -> None:
        self.go, self.rows, self.pictures, self.others = threading.Event(), [], [], []

    def log(self, step, values):
        self.go.wait(30)
        self.rows.append((step, values))

    def image(self, step, name, path):
        self.pictures.append(step)

    def summary(self, values):
        self.others.append(values)

    def finish(self, exit_code=0):
        self.others.append(exit_code)


def queued(client, seconds=30.0):
    ended = []
    monitor = sender.QueuedMonitor(lambda: client, get_logger(), seconds, lambda: ended.append(1), Path("run/wandb"))
    return monitor, ended


def test_the_oldest_pictures_go_first_then_the_oldest_rows_and_nothing_else(monkeypatch, said):
    monkeypatch.setattr(sender, "MOST_WAITING", 5)
    client = Slow()
    monitor, ended = queued(client)
    monitor.log(-1, {"a": 0.0})
    while monitor.waiting:  # the thread has taken it and waits
        time.sleep(0.001)
    monitor.log(0, {})
    monitor.summary({"depth": 4})
    for step in (1, 2):
        monitor.image(step, "samples/x", Path("none.png"))
    monitor.log(3, {})
    assert not monitor.dropped
    monitor.log(4, {})
    assert monitor.dropped == {"picture": 1} and [i.kind for i in monitor.waiting] == [
        "row", "summary", "picture", "row", "row",
    ]  # fmt: skip
    monitor.log(5, {})
    monitor.log(6, {})
    assert monitor.dropped == {"picture": 2, "row": 1}
    client.go.set()
    monitor.finish()
    assert [step for step, _ in client.rows] == [-1, 3, 4, 5, 6] and client.others == [{"depth": 4}, 0]
    assert client.pictures == [] and ended == []
    assert said.text.count("slower than the run") == 1
    assert "missed 2 pictures and 1 row" in said.text
    monitor.finish(1)
    monitor.log(7, {})
    assert client.others[-1] == 0 and client.rows[-1][0] == 6  # nothing after the end


def test_a_row_holds_what_it_held_when_it_was_logged():
    client = Slow()
    client.go.set()
    monitor, _ = queued(client)
    row = {"a": 1.0}
    monitor.log(0, row)
    row["a"] = 2.0
    monitor.finish()
    assert client.rows == [(0, {"a": 1.0})]


@pytest.mark.parametrize("hurry", [False, True])
def test_a_client_that_never_returns_is_left_behind_in_time(said, monkeypatch, hurry):
    monkeypatch.setattr(sender, "HURRY_SECONDS", 0.3)
    client = Slow()
    monitor, ended = queued(client, seconds=30.0 if hurry else 0.3)
    for step in range(3):
        monitor.log(step, {})
    start = time.monotonic()
    monitor.finish(hurry=hurry)
    assert 0.25 < time.monotonic() - start < 5 and ended == [1]
    assert "is left behind" in said.text and "missed 2 rows" in said.text
    assert "`wandb sync --include-online run/wandb/latest-run`" in said.text
    client.go.set()


@pytest.mark.parametrize(("fails", "missed"), [("start", 3), ("row", 2)])
def test_a_client_that_ends_is_told_with_what_it_has_missed(said, fails, missed):
    class Leaving(Slow):
        def log(self, step, values):
            if step == 1:
                raise SystemExit(-9)
            self.rows.append((step, values))

    client = Leaving()

    def start():
        if fails == "start":
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")
        return client

    monitor = sender.QueuedMonitor(start, get_logger(), 30.0, lambda: None, Path("run/wandb"))
    for step in range(2):
        monitor.log(step, {})
    monitor.thread.join(5)
    before = time.monotonic()
    monitor.log(2, {})
    monitor.finish()
    assert time.monotonic() - before < 5 and not monitor.waiting
    assert "has ended (" + ("Unicode" if fails == "start" else "SystemExit: -9") in said.text
    assert f"missed {missed} rows" in said.text and len(client.rows) == 3 - missed


@pytest.mark.parametrize("setting", ["WANDB_BASE_URL=http://[x", "netrc"])
def test_credentials_that_cannot_be_read_are_none(wandb_home, monkeypatch, setting):  # noqa: F811
    name, _, value = setting.partition("=")
    (wandb_home / "netrc").write_bytes(b"machine api.wandb.ai login a password b\n" + (b"" if value else b"# \xff\n"))
    assert wandb_run.has_credentials() is bool(value)
    if value:
        monkeypatch.setenv(name, value)
        assert not wandb_run.has_credentials()


def test_a_server_that_never_answers_costs_the_run_nothing(wandb_home, monkeypatch, said, silent_server):  # noqa: F811
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server[0])
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 2.0)
    run_dir = write_run(wandb_home / "run")
    start = time.monotonic()
    monitor = metrics.open_monitor(Config(), run_dir, enabled=True)
    for step in range(1000, 1200):
        monitor.log(step, {"train/loss": 1.0})
        monitor.image(step, "samples/final", run_dir / "samples" / "final.png")
    assert time.monotonic() - start < 1.5  # the client is still waiting for its first answer
    monitor.finish()
    assert 1.5 < time.monotonic() - start < 60 and silent_server[1], "the client has not asked the server"
    assert "trying offline" in said.text
    import wandb

    wandb.teardown()
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")  # what the plain copy holds can be sent later
    rows = [row["step"] for row in history(wandb_records(file)) if "train/loss" in row]
    assert rows == list(range(1000, 1200))


def services() -> list[psutil.Process]:
    """This process's W&B services that live."""
    children = psutil.Process().children()
    return [c for c in children if c.name() == "wandb-core" and c.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("rows", [3000, 20])
def test_a_service_that_hangs_neither_slows_the_run_nor_its_end(wandb_home, monkeypatch, said, rows):  # noqa: F811
    """After 3,000 rows the socket is full; after 20 the client still takes leave, then asks how its process ended."""
    if rows == 20:  # the kill comes after that leave, as it sometimes does
        kill = psutil.Process.kill
        monkeypatch.setattr(psutil.Process, "kill", lambda process: threading.Timer(0.5, kill, [process]).start())
    run_dir = write_run(wandb_home / "run")
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    monitor = metrics.open_monitor(Config(), run_dir, enabled=True)
    monitor.log(1, {"train/loss": 1.0})
    end = time.monotonic() + 60
    while monitor.client.waiting or not list((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        assert time.monotonic() < end
        time.sleep(0.01)
    (service,) = services()
    os.kill(service.pid, signal.SIGSTOP)
    start, slowest = time.monotonic(), 0.0
    for step in range(2, 2 + rows):
        before = time.monotonic()
        monitor.log(step, {"train/loss": 1.0, "train/lr": 0.1})
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.5 and time.monotonic() - start < 5
    start = time.monotonic()
    monitor.finish()
    assert time.monotonic() - start < 10
    assert "is left behind" in said.text and not services()
    (named,) = re.findall("`wandb sync --include-online (.*)`", said.text)
    assert list(Path(named).glob("*.wandb")) == list((run_dir / "wandb" / "latest-run").glob("*.wandb")) != []
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 50 + 1 + rows
    import wandb

    wandb.teardown()  # as the exit of the process does: nothing is left to wait for
    assert time.monotonic() - start < 20


@pytest.mark.full
def test_offline_folders_of_a_resumed_run_sync_as_one_run(wandb_home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = write_run(wandb_home / "run", [decision_row(step=3)])
    facts = {"data_digest": "ab" * 32, "kept_blocks": [0]}
    for start in (0, 3):
        monitor = metrics.open_monitor(Config(), run_dir, enabled=True)
        for step in range(start, start + 3):
            monitor.log(step, {"train/loss": 10.0 - step})
        if start:
            monitor.decision(decision_row(step=3))
            monitor.image(5, "samples/final", run_dir / "samples" / "final.png")
            monitor.artifact(run_dir / "samples", "run depth 2", "model", facts)
        monitor.finish()
        time.sleep(1.1 if not start else 0)  # folders are named by the second, and told apart by it
    import wandb

    wandb.teardown()
    with wandb_server() as (address, received):
        told = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "HOME": str(wandb_home)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | told
        folders = sorted(map(str, (run_dir / "wandb").glob("offline-run-*")))
        command = [sys.executable, "-m", "wandb", "sync", *folders]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and len(folders) == 2, done.stdout + done.stderr
    assert not received.problems and "rror" not in done.stderr, (received.problems, done.stderr)
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    assert received.runs == {run_id}
    rows = [row for _, row in sorted(received.history[run_id].items())]
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2, 3, 4, 5]
    assert [row["_step"] for row in rows] == list(range(len(rows)))  # the second folder goes on where the first ended
    assert "removed blocks 1 and 2" in next(row["prune/decision"] for row in rows if "prune/decision" in row)
    pictures = [name for name in received.files if name.startswith("media/images/")]
    assert len(pictures) == 2 and all(received.files[name][:4] == b"\x89PNG" for name in pictures)  # heat map, samples
    tables = [name for kind, name in received.artifacts if kind == "run_table"]
    assert len(tables) == 2  # scores and vote
    assert received.artifacts["model", "run_depth_2"] == facts
    assert len(list(run_dir.glob("wandb/offline-run-*/*.synced"))) == 2


@pytest.mark.full
def test_what_an_online_run_could_not_send_is_sent_from_the_folder_that_the_warning_names(wandb_home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = write_run(wandb_home / "run")
    monitor = metrics.open_monitor(Config(), run_dir, enabled=True)
    for step in range(3):
        monitor.log(step, {"train/loss": 1.0})
    monitor.finish()
    import wandb

    wandb.teardown()
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    online = folder.rename(folder.with_name(folder.name.removeprefix("offline-")))  # by its name the client knows it
    latest = run_dir / "wandb" / "latest-run"
    latest.unlink()
    latest.symlink_to(online.name)
    with wandb_server() as (address, received):
        told = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "HOME": str(wandb_home)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | told
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(latest)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
    (rows,) = received.history.values()
    assert [row["step"] for _, row in sorted(rows.items())] == [0, 1, 2]
