"""The count of restarts in a run folder, the agreement to stop, and what is said of a wrong launch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from entprune_ds import restarts, stop_request
from entprune_ds.cli.common import REFUSAL_SECONDS
from entprune_ds.cli.encode import main as encode
from entprune_ds.cli.evaluate import main as evaluate
from entprune_ds.cli.sample import main as sample
from entprune_ds.cli.slurm import main as slurm_command
from entprune_ds.cli.train import limit_threads
from entprune_ds.cli.train import main as train
from tests.ranks import ROOT, run_ranks
from tests.test_faults import LAUNCHER, finish, launch, wait_for_step
from tests.test_locks import hold
from tests.test_training import losses, words


def reach(run: Path, step: int) -> None:
    """The newest checkpoint of a run is at this step."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}")


def test_restarts_count_until_there_is_a_newer_checkpoint(tmp_path):
    def count(job: str, start: int) -> int:
        return restarts.begin(tmp_path, job, start).count

    assert [count("7", start) for start in range(3)] == [0, 1, 2]
    reach(tmp_path, 40)
    assert restarts.next_count(tmp_path) == 0 and count("7", 3) == 0 and count("7", 4) == 1
    reach(tmp_path, 20)  # an older one is no progress
    assert count("7", 5) == 2
    assert count("8", 0) == 0  # the user has started another job
    assert count("8", 1) == 1 and count("8", 0) == 0
    (tmp_path / restarts.FILE).write_text("{")
    assert count("8", 2) == 0 and restarts.read(tmp_path) == restarts.Restarts(job="8", step=20, count=0)


def test_a_crash_loop_is_told_with_the_rank_that_ended_first(tmp_path):
    assert restarts.loop_problem(tmp_path, 3, 3, tmp_path) is None
    assert "No rank has said how it ended" in restarts.loop_problem(tmp_path, 3, 4, tmp_path)
    for rank, said in {2: "disk on fire\n\n", 0: "rank 0 lost contact", 1: "rank 1 lost contact"}.items():
        (tmp_path / f"rank_{rank}.log").write_text(f"== rank {rank}\n{said}")
    (tmp_path / "ended").write_text("137 2 n07\n")
    reach(tmp_path, 40)
    problem = restarts.loop_problem(tmp_path, 3, 4, tmp_path)
    assert "3 restart(s)" in problem and "newer than step 40" in problem and f"Logs: {tmp_path}." in problem
    assert "Rank 2 on n07 ended first, with status 137; its log ends with: disk on fire" in problem


def test_ranks_agree_to_stop_at_the_same_step_and_look_rarely():
    """Rank 1 alone is asked, in the middle; a rank that looked by itself would wait for ever."""
    found = run_ranks("tests.workers.stop_request:stops", 2, steps=3000, asked_at=1700)
    assert found[0]["stopped"] == found[1]["stopped"]
    assert 1700 < found[0]["stopped"] <= 1700 + 200
    assert found[0]["looks"] == found[1]["looks"] < 40
    assert run_ranks("tests.workers.stop_request:stops", 2, steps=300, asked_at=1000)[0]["stopped"] is None


def test_the_first_look_comes_after_one_step():
    """At the start nothing is known of the length of a step, and 200 of them may take longer than a job has left."""
    stop_request.listen()
    try:
        watch = stop_request.StopWatch(5)
        assert not watch.asked(5)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.asked(6)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_what_is_refused_after_progress_may_be_tried_again(tmp_path, capsys):
    """Status 2 is also that of a file server in trouble; the next start refuses what is really wrong."""
    given = ["most=3", "start=0", "job=7", f"logs={tmp_path}"]
    words, run = ["--", "preset=digits", f"run.root={tmp_path}", "run.name=run"], tmp_path / "run"
    assert slurm_command(["begin", *given, *words]) == 0
    assert capsys.readouterr().out == f"{run}\n"
    assert slurm_command(["again", *given, "status=2", *words]) == 2
    assert slurm_command(["again", *given, "status=75", *words]) == 0
    reach(run, 10)
    assert slurm_command(["again", *given, "status=2", *words]) == 0
    another = ["most=3", "start=0", "job=8", f"logs={tmp_path}"]
    assert slurm_command(["again", *another, "status=2", *words]) == 2  # it was refused: that progress is not its own
    assert capsys.readouterr() == ("", "")
    before = (run / restarts.FILE).read_text()
    with hold(run) as owner:
        assert slurm_command(["begin", *another, *words]) == 2
        owner.kill()
    assert f"{run} is in use by host" in capsys.readouterr().err and (run / restarts.FILE).read_text() == before


@pytest.mark.parametrize("word", ["--dry-run", "--help"])
def test_a_job_that_only_tells_something_leaves_no_run_folder(tmp_path, capsys, word):
    given = ["begin", "most=3", "start=0", "job=7", f"logs={tmp_path}", "--", "preset=digits", f"run.root={tmp_path}"]
    assert slurm_command([*given, word]) == 0
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_threads_of_a_rank_are_those_that_slurm_gave_it(monkeypatch):
    """OMP_NUM_THREADS counts where no launcher has set it; else the CPUs that the job may use are shared."""
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        limit_threads()
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads()
        assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.full
def test_usr1_to_one_rank_saves_and_ends_all_with_status_85(digits, tmp_path):
    """Outside Slurm too, under the deepspeed launcher; nothing is lost, and the same command goes on.

    A W&B client that hangs is not waited for longer than the 30 s that Slurm gives.
    """
    given = words(digits, tmp_path, "run", "train.num_steps=4000", "prune.end_step=8", "train.checkpoint_every=4000")
    given.append("monitor.wandb=true")
    process = launch(given, tmp_path / "log")
    wait_for_step(tmp_path / "run", 20, process)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in below if "--local_rank=1" in p.cmdline()]
    (service,) = [p for p in below if p.name() == "wandb-core"]
    service.suspend()
    ranks[-1].send_signal(signal.SIGUSR1)
    finish(process, seconds=120)
    text = (tmp_path / "log").read_text()
    step = int(text.partition("stopped before step ")[2].partition(",")[0])
    assert "return code = 85" in text and "the same command resumes from it" in text
    assert "Weights & Biases did not finish within 15 s" in text
    assert max(losses(tmp_path / "run")) == step
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{step:08d}"


RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20000"}
NO_RANK = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
LAUNCHES = [
    (NO_RANK, "srun has started 4 tasks, but `RANK` is missing"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 processes"),
    ({**RANK, "RANK": "2"}, "`RANK` is 2, but `WORLD_SIZE` is 2"),
    ({**RANK, "LOCAL_WORLD_SIZE": "0"}, "`LOCAL_RANK` is 0, but `LOCAL_WORLD_SIZE` is 0"),
    ({**RANK, "WORLD_SIZE": "two"}, "`WORLD_SIZE` is 'two'"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "`MASTER_ADDR` and `MASTER_PORT` missing, though `WORLD_SIZE` is 2"),
]


@pytest.mark.parametrize(("variables", "said"), LAUNCHES)
@pytest.mark.parametrize("command", [train, encode, sample, evaluate])
def test_launches_that_cannot_work_are_refused_before_any_work(monkeypatch, capsys, tmp_path, variables, said, command):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = [f"run.root={tmp_path}"] if command is train else [f"out={tmp_path}/out"]
    given += ["data.shards=x", "sample.vae=x"] if command is encode else []
    assert command(given) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_rank_leaves_the_first_one_of_its_node_time_to_speak():
    """A launcher ends all ranks as soon as one has left, and rank 0 may be the last to have read its settings."""
    command = [sys.executable, "-m", "entprune_ds.cli.train", "preset=none"]
    said, seconds = [], []
    for rank in ("0", "1"):
        start = time.monotonic()
        done = subprocess.run(command, env=os.environ | RANK | {"LOCAL_RANK": rank}, capture_output=True, text=True)
        assert done.returncode == 2
        said.append("error: " in done.stderr)
        seconds.append(time.monotonic() - start)
    assert said == [True, False] and seconds[1] >= REFUSAL_SECONDS


CHAIN = """
import json
from entprune_ds.launcher import launch_problems, launchers
print(json.dumps([[p.cmdline()[-1] for p in launchers()], launch_problems()]))
"""


def below_a_launcher(tmp_path, name: str, **variables: str) -> tuple[list[str], list[str]]:
    """What a rank sees under a process of that name that a shell has started, whose command text holds the name."""
    (tmp_path / "rank.py").write_text(CHAIN)
    start = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}])"
    (tmp_path / "launcher.py").write_text(start)
    inner = f"{sys.executable} {tmp_path / 'launcher.py'} {name}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | RANK | variables
    command = ["bash", "-c", f"{inner}; true"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    above, problems = json.loads(done.stdout)
    return above, problems


@pytest.fixture
def slurmd(tmp_path):
    """Stands for the daemon that Slurm runs on its nodes."""
    shutil.copy("/bin/sleep", tmp_path / "slurmd")
    process = subprocess.Popen([tmp_path / "slurmd", "60"])
    yield process
    process.kill()
    process.wait()


def slurm_runs() -> bool:
    """Whether some test beside this one runs a Slurm."""
    return any(p.info["name"] == "slurmd" for p in psutil.process_iter(["name"]))


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "/usr/bin/torchrun", "/usr/bin/deepspeed", "other.py"])
def test_a_shell_whose_script_names_a_launcher_is_none(tmp_path, name):
    above, problems = below_a_launcher(tmp_path, name)
    assert above == ([] if name == "other.py" else [name])
    assert problems == [] or (name == "deepspeed.launcher.launch" and slurm_runs())


def test_a_rank_that_ssh_has_started_on_a_node_of_slurm_is_refused_unless_it_is_meant(tmp_path, slurmd):
    """Neither its environment nor its group of processes says Slurm: the daemon of the node does."""
    for name, variables, refused in (
        ("deepspeed.launcher.launch", {}, True),
        ("deepspeed.launcher.launch", {"ENTPRUNE_ALLOW_SSH": "1"}, False),
        ("deepspeed.launcher.launch", {"SLURM_STEP_ID": "0"}, False),  # srun has started the launcher
        ("/usr/bin/torchrun", {}, False),
    ):
        _, problems = below_a_launcher(tmp_path, name, **variables)
        assert len(problems) == refused, (name, variables, problems)
        if refused:
            assert "past Slurm" in problems[0] and "ENTPRUNE_ALLOW_SSH=1 into ~/.deepspeed_env" in problems[0]


PDSH = """#!/bin/bash
# Stands for pdsh, without ssh: what it is told to run becomes a child of init, as behind a remote sshd.
while [[ "$1" == -* ]]; do [[ "$1" == -S ]] && shift || shift 2; done
command="$*"
setsid --fork bash -c "${command//%n/0} >$PLACE/log 2>&1; touch $PLACE/done"
for i in {1..1200}; do [[ -e $PLACE/done ]] && exit; sleep 0.1; done
"""


@pytest.mark.full
@pytest.mark.parametrize("how", ["job", "node", "allowed", "neither"])
def test_a_launch_by_pdsh_is_refused_under_slurm_only(tmp_path, how, request):
    """The real `deepspeed --launcher pdsh`, with a stand-in for pdsh."""
    if how in ("node", "allowed"):
        request.getfixturevalue("slurmd")
    elif how == "neither" and slurm_runs():
        pytest.skip("a Slurm runs on this machine")
    (tmp_path / "pdsh").write_text(PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("ENTPRUNE_ALLOW_SSH=1\n" if how == "allowed" else "")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLACE": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "12"} if how == "job" else {}
    command = [LAUNCHER, "--hostfile", str(tmp_path / "hosts"), "--force_multi", "--no_ssh_check", "--launcher", "pdsh"]
    command += ["--master_addr", "127.0.0.1", "--module", "entprune_ds.cli.train", "preset=digits", "data.shards="]
    subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=200)
    text = (tmp_path / "log").read_text()
    refused = how in ("job", "node")
    assert ("past Slurm" in text and "sbatch slurm/prune_xl.sh" in text) is refused
    assert ("`data.shards` is empty" in text) is not refused
