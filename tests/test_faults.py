"""Real signals to real ranks under the real launcher: the job ends clearly, and the same command finishes it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from entprune_ds import fault_points
from entprune_ds.atomic import file_sha256
from entprune_ds.cli import evaluate, export, report, sample
from entprune_ds.config import load_config
from entprune_ds.data.stream import Stream
from entprune_ds.engine.checkpoint import manifest_sha256
from entprune_ds.engine.state import TESTED_DEEPSPEED
from tests.ranks import free_port, run_ranks
from tests.test_training import equal_state, losses, words

FULL = pytest.mark.full
TRAIN = "tests.workers.training:train"
LAUNCHER = str(Path(sys.executable).parent / "deepspeed")


def launch(
    arguments: list[str], log: Path, num_ranks: int = 2, module: str = "entprune_ds.cli.train"
) -> subprocess.Popen:
    """Start a training under the deepspeed launcher, as a user would."""
    command = [LAUNCHER, "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command += ["--module", module, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and pass that on
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


def shared_buffers(process: subprocess.Popen) -> list[str]:
    """Names of DeepSpeed's buffers of a job in shared memory (66 MiB a rank), where they outlive every process."""
    port = process.args[process.args.index("--master_port") + 1]
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")]


@pytest.fixture(scope="module")
def undisturbed_with(digits, tmp_path_factory) -> Callable[..., Path]:
    """The run with further settings that nothing happens to."""

    @functools.cache
    def run(*more: str) -> Path:
        root = tmp_path_factory.mktemp("undisturbed")
        run_ranks(TRAIN, 2, runs=[words(digits, root, "whole", *LONG, *more)])
        return root / "whole"

    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_with) -> Path:
    """The run that nothing happens to."""
    return undisturbed_with()


LONG = ["train.num_steps=60", "prune.end_step=40", "train.checkpoint_every=10", "train.validate_every=0"]
LONG += ["prune.max_blocks_per_check=1"]  # two removals


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=FULL)])
def test_killing_one_rank_ends_the_job_and_the_same_command_resumes(digits, tmp_path, undisturbed, victim):
    run, log = tmp_path / "killed", tmp_path / "log"
    arguments = words(digits, tmp_path, "killed", *LONG)
    process = launch(arguments, log)
    wait_for_step(run, 25, process)
    os.kill(rank_pids(log)[victim], signal.SIGKILL)
    start = time.monotonic()
    assert finish(process, seconds=60) != 0
    assert time.monotonic() - start < 60
    assert not [pid for pid in rank_pids(log) if psutil.pid_exists(pid)]
    text = log.read_text()
    assert "the same command resumes from it" in text
    assert re.search(r"newest checkpoint is .*step_000000[2-5]\d", text)
    again = launch(arguments, log)
    assert finish(again, seconds=200) == 0
    assert not [name for p in (process, again) for name in shared_buffers(p)]  # of the killed job and of the other
    assert losses(run) == losses(undisturbed)
    assert equal_state(run / "checkpoints/step_00000060", undisturbed / "checkpoints/step_00000060")
    assert (run / "decisions.jsonl").read_text() == (undisturbed / "decisions.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=FULL)])
def test_ranks_stop_when_only_their_launcher_is_hit(digits, tmp_path, number):
    """Not by Ctrl-C, which reaches them too, but by `kill`: they must not train on as orphans."""
    log = tmp_path / "log"
    process = launch(words(digits, tmp_path, "orphan", *LONG, "train.num_steps=5000"), log)
    wait_for_step(tmp_path / "orphan", 25, process)
    os.kill(process.pid, number)
    start = time.monotonic()
    finish(process, seconds=60)
    while any(psutil.pid_exists(pid) for pid in rank_pids(log)) and time.monotonic() - start < 60:
        time.sleep(0.1)
    assert time.monotonic() - start < 60
    text = log.read_text()
    assert re.search(r"its launcher \(process \d+\) is gone", text)
    assert "the same command resumes from it" in text


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


def test_a_shard_that_breaks_while_training_ends_the_job_with_its_name(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    process = launch(words(str(data), tmp_path, "broken", *LONG, "data.shuffle_buffer=16"), tmp_path / "log")
    wait_for_step(tmp_path / "broken", 2, process)
    for shard in (data / "train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:2000])
    assert finish(process, seconds=60) != 0
    text = (tmp_path / "log").read_text()
    assert re.search(r"step \d+: .*shard-\d+\.tar", text)
    assert "the same command resumes from it" in text


@pytest.mark.full
def test_data_that_is_bad_from_the_start_for_one_rank_ends_all_with_one_message(digits, tmp_path):
    """Rank 1 finds no sound example in its first pass; rank 0, whose data are sound, hears of it at the same batch."""
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    settings = load_config(words(str(data), tmp_path, "bad"))
    order = {"num_readers": settings.data.num_readers, "shuffle_buffer": settings.data.shuffle_buffer}
    stream = Stream(data / "train", seed=settings.run.seed, global_batch_size=order["num_readers"], **order)
    values = json.loads((data / "train" / "index.json").read_text())
    for entry in values["shards"]:
        if any(entry["name"] == shard.name for shard in stream.readers[1].shards):
            path = data / "train" / entry["name"]
            path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX"))
            entry["sha256"] = file_sha256(path)
    (data / "train" / "index.json").write_text(json.dumps(values))
    process = launch(words(str(data), tmp_path, "bad", "data.max_skipped=100000"), tmp_path / "log")
    assert finish(process, seconds=100) == 2
    text = (tmp_path / "log").read_text()
    assert text.count("step 0: Not one of the") == 1 and "epoch of reader 1 (shard-" in text
    assert "[rank 1]" not in text.partition("Not one of the")[2] and "lost contact" not in text


def small_disk(folder: Path, megabytes: int) -> None:
    """Mount a small file system, or skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs permission to mount a small file system")


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_full_or_read_only_disk_is_one_error_on_all_ranks(digits, tmp_path, kind):
    disk = tmp_path / "disk"
    small_disk(disk, megabytes=1 if kind == "full" else 64)
    try:
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        process = launch(words(digits, disk, "run", "model.hidden_size=96"), tmp_path / "log")
        assert finish(process, seconds=100) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    text = (tmp_path / "log").read_text()
    message = "two checkpoints of this model need" if kind == "full" else "cannot be written"
    assert text.count(message) == 1
    assert "run.root" in text


def test_a_disk_that_fills_while_training_costs_only_the_steps_since_the_checkpoint(digits, tmp_path, undisturbed):
    disk, log = tmp_path / "disk", tmp_path / "log"
    small_disk(disk, megabytes=32)
    arguments = words(digits, disk, "run", *LONG)
    try:
        process = launch(arguments, log)
        wait_for_step(disk / "run", 25, process)
        with open(disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        assert finish(process, seconds=60) != 0
        text = log.read_text()
        assert "No space left on device" in text
        assert "Free space" in text
        assert "Traceback" not in text
        (disk / "ballast").unlink()
        assert finish(launch(arguments, log), seconds=200) == 0
        assert losses(disk / "run") == losses(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.full
def test_a_model_that_diverges_between_two_log_lines_is_not_saved(digits, tmp_path):
    more = ["train.learning_rate=1e30", "train.grad_clip=0", "monitor.log_every=100", "prune.target_depth=null"]
    more += ["train.bad_steps=0"]  # else the steps after the first do not count
    process = launch(words(digits, tmp_path, "run", *more, "parallel.ds_config=zero0_fp32"), tmp_path / "log")
    assert finish(process, seconds=100) == 2
    text = (tmp_path / "log").read_text()
    assert re.search(r"step 4: (weight|exp_avg|exp_avg_sq|ema) of \S+ is not finite", text)
    assert "train.learning_rate" in text
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.full
def test_a_checkpoint_of_another_model_is_refused_with_the_parameters(digits, tmp_path):
    run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "a", "train.num_steps=8")])
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 32", "hidden_size: 64"))
    process = launch(words(digits, tmp_path, "a", "train.num_steps=8", "model.hidden_size=64"), tmp_path / "log")
    assert finish(process, seconds=100) == 2
    text = (tmp_path / "log").read_text()
    assert text.count("holds another model") == 1
    assert "blocks." in text


@pytest.mark.full
def test_a_checkpoint_of_a_newer_version_is_refused_by_all_ranks_and_stays(digits, tmp_path):
    run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "a", "train.num_steps=8")])
    manifest = tmp_path / "a" / "checkpoints" / "step_00000008" / "manifest.json"
    values = json.loads(manifest.read_text()) | {"format": 2}
    manifest.write_text(newer := json.dumps(values | {"sha256": manifest_sha256(values)}))
    process = launch(words(digits, tmp_path, "a", "train.num_steps=8"), tmp_path / "log")
    assert finish(process, seconds=100) == 2
    text = (tmp_path / "log").read_text()
    assert text.count("has format 2, this version of entprune_ds reads up to 1. Install the version that wrote it") == 1
    assert manifest.read_text() == newer and "is damaged" not in text


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ("", "DeepSpeedZeroOptimizer has no gone_in_a_later_version."),
        pytest.param("parallel.pipe_stages=2", "has no PipelineEngine.gone_in_a_later_version.", marks=FULL),
    ],
)
@pytest.mark.full
def test_a_deepspeed_without_what_we_rely_on_is_one_error_on_all_ranks(digits, tmp_path, more, lacks):
    arguments, log = words(digits, tmp_path, "other", *more.split()), tmp_path / "log"
    process = launch(arguments, log, module="tests.workers.other_deepspeed")
    assert finish(process, seconds=100) == 2
    text = log.read_text()
    assert text.count(f"{lacks} Install deepspeed=={TESTED_DEEPSPEED}") == 1
    assert text.count("gone_in_a_later_version") == 1 and "Traceback" not in text
    assert not (tmp_path / "other" / "checkpoints").exists()


@FULL
def test_a_rank_that_stands_still_ends_the_job_at_the_time_out(digits, tmp_path):
    log = tmp_path / "log"
    process = launch(words(digits, tmp_path, "still", *LONG, "run.timeout_seconds=10"), log)
    wait_for_step(tmp_path / "still", 12, process)
    os.kill(rank_pids(log)[1], signal.SIGSTOP)
    start = time.monotonic()
    assert finish(process, seconds=60) != 0
    assert time.monotonic() - start < 60
    assert "lost contact with another rank" in log.read_text()


def wait_for_text(log: Path, pattern: str, count: int, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until the output holds a pattern that many times."""
    end = time.monotonic() + seconds
    while len(re.findall(pattern, log.read_text() if log.is_file() else "")) < count:
        assert time.monotonic() < end and process.poll() is None, f"{pattern} is missing ({process.poll()})"
        time.sleep(0.05)


def as_started(whole: Path, run: Path) -> None:
    """A run folder as it was at step 0 of another run: the pipeline's layers have been timed, and will not be again."""
    shutil.copytree(whole / "checkpoints" / "step_00000000", run / "checkpoints" / "step_00000000")
    (run / "checkpoints" / "latest").write_text("step_00000000")
    (run / "config.yaml").write_text((whole / "config.yaml").read_text().replace("name: whole", f"name: {run.name}"))


POINTS = [p for p in fault_points.POINTS if p != "rollback"]  # after bad steps only: test_bad_steps.py


@pytest.mark.parametrize(
    ("point", "victim", "more"),
    [
        ("resize", 1, ""),
        *(pytest.param(p, v, "", marks=FULL) for p in POINTS for v in (0, 1) if (p, v) != ("resize", 1)),
        *(pytest.param("resize", v, "parallel.ds_config=zero3_fp32", marks=FULL) for v in (0, 1)),
        *(pytest.param("resize", v, "parallel.pipe_stages=2", marks=FULL) for v in (0, 1)),
    ],
)
@pytest.mark.full
def test_a_rank_killed_in_the_middle_of_something_costs_nothing_but_time(
    digits, tmp_path, undisturbed_with, monkeypatch, point, victim, more
):
    run, log, undisturbed = tmp_path / "killed", tmp_path / "log", undisturbed_with(*more.split())
    arguments = words(digits, tmp_path, "killed", *LONG, *more.split())
    if "pipe_stages" in more:
        as_started(undisturbed, run)
    monkeypatch.setenv(fault_points.VARIABLE, f"{point}:4:2")  # the second time: there is something to lose
    process = launch(arguments, log)
    wait_for_text(log, f"waiting at {point} ", 1 if point == "latest" else 2, process)
    os.kill(rank_pids(log)[victim], signal.SIGKILL)
    start = time.monotonic()
    assert finish(process, seconds=60) != 0
    assert time.monotonic() - start < 60
    monkeypatch.delenv(fault_points.VARIABLE)
    decided = (run / "decisions.jsonl").read_text() if (run / "decisions.jsonl").is_file() else ""
    again = launch(arguments, log)
    assert finish(again, seconds=200) == 0
    assert (run / "decisions.jsonl").read_text().startswith(decided)  # nothing that was decided is taken back
    assert losses(run) == losses(undisturbed)
    assert equal_state(run / "checkpoints/step_00000060", undisturbed / "checkpoints/step_00000060")
    assert (run / "decisions.jsonl").read_text() == (undisturbed / "decisions.jsonl").read_text()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000060"
    assert not list((run / "checkpoints").glob(".*"))


def test_an_unknown_point_is_an_error_that_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv(fault_points.VARIABLE, "rezise:5")
    with pytest.raises(ValueError, match="resize"):
        fault_points.reach("scoring")


@FULL
def test_a_planted_pickle_in_a_run_folder_is_never_executed(digits, tmp_path):
    """Under every name that a loader might look for, beside and in place of our files."""
    run, mark = tmp_path / "planted", tmp_path / "executed"

    def train_to(step: int) -> None:
        assert run_ranks(TRAIN, 1, runs=[words(digits, tmp_path, "planted", f"train.num_steps={step}")]) == [[0]]
        assert max(losses(run)) == step

    train_to(8)
    bomb = pickle.dumps(Bomb(str(mark)))
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step_00000008", run / "model"):
        for name in ("model.pt", "mp_rank_00_model_states.pt", "state.pkl", "training_args.bin", ".metadata"):
            (folder / name).write_bytes(bomb)
    train_to(9)
    (run / "checkpoints" / "step_00000009" / "rank_00000.safetensors").write_bytes(bomb)  # damaged: passed over
    train_to(10)
    out, few = str(tmp_path / "out"), ["sample.num_steps=1", "monitor.wandb=false"]
    figures = ["sample.num_samples=80", "evaluate.latency_repeats=1", "evaluate.latency_batches=[1]"]
    assert export.main([f"run={run}", f"out={out}"]) == 0
    assert sample.main([f"run={run}", f"out={out}.npz", "sample.num_samples=4", *few]) == 0
    assert evaluate.main([f"run={run}", f"out={out}.json", *figures, *few]) == 0
    assert report.main([str(run)]) == 0
    for form in ("", "format=official", "format=diffusers"):
        assert export.main([f"src={run / 'model' / 'model.pt'}", f"out={out}_of_a_bomb", *form.split()]) == 2
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # the bomb is live
    mark.unlink()
    launched = launch(words(digits, tmp_path, "bombed", f"model.weights={run / 'model.pt'}"), tmp_path / "log", 1)
    assert finish(launched, seconds=60) == 2
    assert not mark.exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))
