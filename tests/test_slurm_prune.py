"""slurm/prune_xl.sh on a real Slurm of two nodes: signals, requeues, crash loops, nodes that fail, whole trainings."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from entprune_ds.cli import slurm as slurm_command
from entprune_ds.fault_points import VARIABLE
from tests.ranks import run_ranks
from tests.test_slurm import CPU_ONLY, NO_CHECK, PRUNE, Job, executable
from tests.test_training import equal_state, losses, words

TWO = ["--nodes=2", "--ntasks-per-node=1", *CPU_ONLY]
TRAIN = "tests.workers.training:train"

RANKS = f"""#!/bin/bash
# Stands for the interpreter: a rank does what $BEHAVE says, the rest is the real one.
[[ "$2" == entprune_ds.cli.slurm ]] && exec {sys.executable} "$@"
eval "$BEHAVE"
"""


def until(condition: Callable[[], object], job: Job, seconds: float = 240) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{job.facts()}\n{job.text()}"
        time.sleep(0.1)


def send(job: Job, *command: str) -> None:
    """A Slurm command about the job, such as scancel."""
    subprocess.run([*command, job.id], env=job.slurm, check=True, timeout=60)


def start_again(job: Job, restarts: int, seconds: float = 240) -> None:
    """Wait until the job is requeued, and make five seconds of the two minutes that Slurm lets it wait."""
    until(lambda: job.facts()["Restarts"] == str(restarts) and job.facts()["JobState"] == "PENDING", job, seconds)
    later = ["StartTime=now+5", "TimeLimit=60"]  # and with all its time, whatever a test has left of it
    subprocess.run(["scontrol", "update", f"JobId={job.id}", *later], env=job.slurm, check=True, timeout=60)


def behaving(slurm: dict[str, str], folder: Path, behave: str, **more: str) -> Job:
    """A job of one rank on each node that does what `behave`, a piece of bash, says; its run folder is folder/run."""
    variables = {"ENTPRUNE_PYTHON": executable(folder / "python", RANKS), "BEHAVE": behave, "PLACE": str(folder)}
    given = ["preset=digits", "data.shards=none", f"run.root={folder}"]
    return Job(slurm | variables | NO_CHECK | more, folder, TWO, given, PRUNE)


def ranks_log(job: Job, folder: Path, rank: int) -> str:
    """What a rank has written to its own log."""
    path = folder / "logs" / f"prune_xl-{job.id}" / f"rank_{rank}.log"
    return path.read_text() if path.exists() else ""


STOP = f"""
[[ $SLURM_RESTART_COUNT == 1 ]] && echo goes on && exit 0
exec {sys.executable} -c '
import os, pathlib, signal, sys, time
rank, place = int(os.environ["RANK"]), pathlib.Path(os.environ["PLACE"])
def leave(number, frame):
    time.sleep(2 * rank)
    (place / f"left_{{rank}}").touch()
    print("rank", rank, "leaves")
    sys.exit(85)
signal.signal(signal.SIGUSR1, leave)
(place / f"ready_{{rank}}").touch()
time.sleep(600)
'
"""


def test_ranks_save_before_the_time_limit_and_the_job_goes_on_by_itself(slurm, tmp_path):
    """The one that leaves first does not take the other along; every rank has a log, rank 0's is in the output too."""
    job = behaving(slurm, tmp_path, STOP)
    until(lambda: len(list(tmp_path.glob("ready_*"))) == 2, job)
    send(job, "scancel", "--batch", "--signal=USR1")
    start_again(job, 1)
    assert {path.name for path in tmp_path.glob("left_*")} == {"left_0", "left_1"}
    assert job.wait() == ("COMPLETED", "0:0"), job.text()
    text = job.text()
    assert "USR1 arrived" in text and f"the time limit is near: job {job.id} is requeued" in text
    assert "rank 0 leaves" in text and "rank 1 leaves" not in text and "start 2: 2 node(s)" in text
    for rank, node in enumerate(("n1", "n2")):
        log = ranks_log(job, tmp_path, rank)
        assert re.search(rf"rank {rank} on {node}, start 1.*rank {rank} leaves.*start 2.*goes on", log, re.S), log


CRASH = """
(( RANK == 1 )) && echo "RuntimeError: GPU 3 fell off the bus" && exit 7
sleep 600
"""


def test_a_crash_loop_ends_with_the_log_and_the_last_error(slurm, tmp_path):
    job = behaving(slurm, tmp_path, CRASH, ENTPRUNE_MAX_RESTARTS="1")
    start_again(job, 1)
    assert job.wait() == ("FAILED", "7:0"), job.text()
    text = job.text()
    assert text.count("the ranks ended with status 7") == 1  # the second time it is not requeued
    assert f"1 restart(s) in a row have brought {tmp_path}/run no checkpoint at all: the job stops here" in text
    assert "Rank 1 on n2 ended first, with status 7; its log ends with: RuntimeError: GPU 3 fell off the bus" in text
    assert f"logs/prune_xl-{job.id}" in text
    assert text.count("    RuntimeError: GPU 3 fell off the bus\n") == 2  # rank 0 has no word of it


@pytest.mark.parametrize(
    ("behave", "what", "outcome"),
    [
        pytest.param("touch $PLACE/ready; sleep 600", ["scancel"], "CANCELLED", marks=pytest.mark.full),
        pytest.param(STOP, ["scancel", "--signal=USR1"], "FAILED 85:0", marks=pytest.mark.full),
        ("echo error: no such preset; exit 2", [], "FAILED 2:0"),
    ],
)
def test_what_a_user_ends_or_must_mend_is_not_requeued(slurm, tmp_path, behave, what, outcome):
    job = behaving(slurm, tmp_path, behave)
    if what:
        until(lambda: list(tmp_path.glob("ready*")), job)
        send(job, *what)
    assert outcome in " ".join(job.wait())
    assert job.facts()["Restarts"] == "0" and "is requeued" not in job.text()


def test_settings_that_are_wrong_are_refused_once_before_any_rank(slurm, tmp_path):
    in_a_step = slurm | {"SLURM_STEP_ID": "0"}  # as in the shell of `srun --pty bash`, which sbatch hands on
    job = Job(in_a_step, tmp_path, TWO, ["preset=digits", "train.num_stepz=3"], PRUNE)
    assert job.wait() == ("FAILED", "2:0")
    assert job.text().count("num_stepz") == 1 and "start 1" not in job.text()


@pytest.mark.parametrize(
    ("there", "seconds", "said"),
    [
        ("echo no interpreter here; exit 1", "100", "no interpreter here"),
        pytest.param("sleep 600", "8", "no answer within 8 s", marks=pytest.mark.full),
    ],
)
def test_a_node_that_fails_at_the_start_is_named(slurm, tmp_path, there, seconds, said):
    """The other node is sound, and is not named."""
    node = f'if [[ $SLURMD_NODENAME == n2 ]]; then {there}; else echo "port 20000"; fi'
    text = RANKS.replace("exec", f'{{ [[ "$3" == node ]] || exec {sys.executable} "$@"; {node}; exit; }}; exec')
    python = executable(tmp_path / "python", text)
    given = ["preset=digits", f"run.root={tmp_path}"]
    job = Job(slurm | {"ENTPRUNE_PYTHON": python, "ENTPRUNE_CHECK_SECONDS": seconds}, tmp_path, TWO, given, PRUNE)
    assert job.wait() == ("FAILED", "2:0"), job.text()
    assert "node n2 failed its check" in job.text() and said in job.text()
    assert "1 of 2 node(s) cannot run this job: n2." in job.text() and "--exclude=n2" in job.text()
    assert "node n1" not in job.text() and "start 1" not in job.text()


@pytest.mark.full
def test_a_node_that_fails_later_is_tried_again(slurm, tmp_path):
    """The job has run before, so the node may recover, or Slurm may give another one."""
    broken = "(( SLURM_RESTART_COUNT == 1 )) && echo no interpreter here && exit 1; echo port 20000; exit"
    text = RANKS.replace("[[", f'[[ "$3" == node ]] && {{ {broken}; }}\n[[', 1)
    behave = "(( SLURM_RESTART_COUNT == 2 )) || exit 7"
    python = executable(tmp_path / "python", text)
    given = ["preset=digits", "data.shards=none", f"run.root={tmp_path}"]
    more = {"ENTPRUNE_PYTHON": python, "BEHAVE": behave, "ENTPRUNE_CHECK_SECONDS": "100"}
    job = Job(slurm | more, tmp_path, TWO, given, PRUNE)
    start_again(job, 1)
    start_again(job, 2)
    assert job.wait() == ("COMPLETED", "0:0"), job.text()
    text = job.text()
    assert text.count("is requeued") == 2 and "a node failed its check, though the job has run before" in text
    assert "node n1 failed its check" in text and "start 2:" not in text and "start 3:" in text


MEANWHILE = """
(( SLURM_RESTART_COUNT == 1 )) && exit 2
mkdir -p $PLACE/run/checkpoints && echo step_00000100 >$PLACE/run/checkpoints/latest
echo "error: cannot read /data/x.tar: Stale file handle" && exit 2
"""


@pytest.mark.full
def test_an_error_after_progress_is_tried_again_once(slurm, tmp_path):
    job = behaving(slurm, tmp_path, MEANWHILE)
    start_again(job, 1)
    assert job.wait() == ("FAILED", "2:0"), job.text()
    assert job.text().count("the ranks ended with status 2: job") == 1 and "start 2:" in job.text()


def test_what_the_check_of_a_node_looks_at(tmp_path, capsys, monkeypatch):
    def said(gpus: int, folder: str, sees: str) -> tuple[int, str]:
        status = slurm_command.main(["node", f"gpus={gpus}", f"folder={folder}", f"sees={sees}", "port=20123"])
        return status, capsys.readouterr().out

    assert said(0, str(tmp_path / "new"), "")[0] == 0 and (tmp_path / "new").is_dir()
    status, text = said(0, str(tmp_path), "")
    assert status == 0 and re.fullmatch(r"port \d{5}\n", text) and list(tmp_path.iterdir()) == [tmp_path / "new"]
    status, text = said(99, str(tmp_path), str(tmp_path / "restarts.json"))
    assert status == 2 and "of the 99 GPUs" in text and "restarts.json, which the first node has written" in text
    (tmp_path / "file").touch()
    assert "file/run cannot be written" in said(0, str(tmp_path / "file" / "run"), "")[1]
    monkeypatch.setitem(sys.modules, "entprune_ds.engine.build", None)
    assert "cannot import torch and deepspeed" in said(0, "", "")[1]


def trained(slurm, folder: Path, given: list[str], *options: str, **variables: str) -> Job:
    """A real training of one rank on each node."""
    more = {"WANDB_MODE": "offline", "ENTPRUNE_MAX_RESTARTS": "9", **variables}
    return Job(slurm | more, folder, [*TWO, *options], given, PRUNE)


def as_undisturbed(run: Path, whole: Path, step: int) -> None:
    """A run that was interrupted ends in the very bytes of the one that was not, as one W&B run."""
    name = f"step_{step:08d}"
    assert losses(run) == losses(whole)
    assert equal_state(run / "checkpoints" / name, whole / "checkpoints" / name)
    for file in (f"checkpoints/{name}/rank_00000.safetensors", f"checkpoints/{name}/rank_00001.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert (run / "decisions.jsonl").read_text() == (whole / "decisions.jsonl").read_text()


def wandb_ids(run: Path) -> list[str]:
    """Run id of every start that has opened W&B."""
    return [path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*") if path.is_dir()]


def test_a_job_of_two_nodes_that_is_asked_to_stop_is_requeued_and_ends_as_if_undisturbed(slurm, digits, tmp_path):
    """The short row. It stops between the two removals."""
    given = words(digits, tmp_path, "cut", "monitor.wandb=true")
    job = trained(slurm, tmp_path, given, **NO_CHECK, **{VARIABLE: "resize:4"})
    run_ranks(TRAIN, 2, runs=[words(digits, tmp_path, "whole")])
    until(lambda: "waiting at resize" in ranks_log(job, tmp_path, 1), job)
    send(job, "scancel", "--batch", "--signal=USR1")
    start_again(job, 1)
    assert job.wait(400) == ("COMPLETED", "0:0"), job.text()
    step = int(re.search(r"stopped before step (\d+), as asked by a signal", job.text())[1])
    assert 0 < step < 12 and (tmp_path / "cut" / "checkpoints" / f"step_{step:08d}").is_dir()
    as_undisturbed(tmp_path / "cut", tmp_path / "whole", 12)
    ids = wandb_ids(tmp_path / "cut")
    assert len(ids) == 2 and set(ids) == {(tmp_path / "cut" / "wandb_id.txt").read_text().strip()}


LONG = ["train.num_steps=60", "prune.end_step=40", "train.checkpoint_every=10", "train.validate_every=0"]


@pytest.mark.full
@pytest.mark.timeout(2400)  # three starts of two ranks, and Slurm's half minutes
def test_a_job_is_requeued_by_scontrol_and_by_its_time_limit_and_ends_as_if_undisturbed(slurm, digits, tmp_path):
    """Both in the middle; in every start, the ranks wait for a while while they write their third checkpoint.

    The first time they are killed there, the second time the time limit comes near; Slurm looks at limits every half
    minute, and the signal goes out up to a minute early.
    """
    given = words(digits, tmp_path, "cut", *LONG, "monitor.wandb=true")
    job = trained(slurm, tmp_path, given, "--time=60", "--signal=B:USR1@600", **{VARIABLE: "checkpoint:60:3"})
    run_ranks(TRAIN, 2, runs=[words(digits, tmp_path, "whole", *LONG)])
    until(lambda: "waiting at checkpoint" in ranks_log(job, tmp_path, 1), job, 600)
    send(job, "scontrol", "requeue")
    start_again(job, 1)
    until(lambda: ranks_log(job, tmp_path, 1).count("waiting at checkpoint") == 2, job, 600)
    ran = re.fullmatch(r"(\d+):(\d+):(\d+)", job.facts()["RunTime"])
    limit = int(ran[1]) * 60 + int(ran[2]) + 10
    subprocess.run(["scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}"], env=slurm, check=True, timeout=60)
    start_again(job, 2, 600)
    assert job.wait(1200) == ("COMPLETED", "0:0"), job.text()
    text = job.text()
    assert text.count("is requeued") == 1 and "DUE TO JOB REQUEUE" in text and "USR1 arrived" in text
    assert re.search(r"stopped before step \d\d, as asked by a signal.*the time limit is near", text, re.S)
    assert "2 node(s) x 1 task(s)" in text and "on n1" in ranks_log(job, tmp_path, 0)
    assert ranks_log(job, tmp_path, 1).count("== rank 1 on n2, start") == 3
    as_undisturbed(tmp_path / "cut", tmp_path / "whole", 60)
    ids = wandb_ids(tmp_path / "cut")
    assert len(ids) == 3 and set(ids) == {(tmp_path / "cut" / "wandb_id.txt").read_text().strip()}
