"""slurm/encode_latents.sh: one rank per task with the right numbers, and every word handed on as it was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.ranks import ROOT

SCRIPT = ROOT / "slurm" / "encode_latents.sh"
FAKES = {
    # two nodes, two tasks on each, one after the other, as srun would start them side by side
    "srun": """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >>"$RECORD/options"; shift; done
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || exit 1
done
""",
    "scontrol": """#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames node[07-08]" ]] && printf "node07\\nnode08\\n"
""",
    "record": f"""#!{sys.executable}
import json, os, sys
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
with open(os.environ["RECORD"] + "/calls", "a") as file:
    print(json.dumps([sys.argv[1:], {{key: os.environ[key] for key in keys}}]), file=file)
""",
}
JOB = {
    "SLURM_JOB_ID": "4321987", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A job as Slurm sets it up, with stand-ins for srun, scontrol and python that record what they are given."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path)}
    return plain | JOB | path | {"ENTPRUNE_PYTHON": str(tmp_path / "record"), "PYTHONPATH": str(ROOT)}


def run(environment, *words) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=120)


def test_every_word_arrives_unmangled_on_every_rank(environment, tmp_path):
    words = ["data.shards=/data/in-{0000..1023}.tar", "out=a b", "sample.vae=$HOME/*", "x='\"", "", "--dry-run"]
    result = run(environment, *words)
    assert result.returncode == 0, result.stderr
    assert "job 4321987: 2 node(s) x 2 task(s), rendezvous node07:21987" in result.stdout
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [arguments for arguments, _ in calls] == [["-m", "entprune_ds.cli.encode", *words]] * 4
    same = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node07", "MASTER_PORT": "21987"}
    expected = [{"RANK": str(r), "LOCAL_RANK": str(r % 2), "OMP_NUM_THREADS": "3", **same} for r in range(4)]
    assert [values for _, values in calls] == expected
    options = (tmp_path / "options").read_text().split()
    assert options == ["--ntasks-per-node=2", "--ntasks=4", "--kill-on-bad-exit=1", "--cpus-per-task=3"]


def test_container_and_further_options_come_from_variables(environment, tmp_path):
    container = {"ENTPRUNE_CONTAINER": "/c/a b.sqsh", "ENTPRUNE_MOUNTS": "/data:/data"}
    container["ENTPRUNE_SRUN"] = "--mpi=none --quiet"
    result = run(environment | container | {"ENTPRUNE_TASKS": "1"})
    options = (tmp_path / "options").read_text().splitlines()
    assert options[:2] == ["--ntasks-per-node=1", "--ntasks=2"]
    expected = ["--container-image=/c/a b.sqsh", "--container-mounts=/data:/data", "--mpi=none", "--quiet"]
    assert result.returncode == 0 and options[4:] == expected


def test_the_command_itself_starts_under_the_script(environment, tmp_path):
    result = run(environment | {"ENTPRUNE_PYTHON": sys.executable}, f"data.shards={tmp_path}/x", f"out={tmp_path}/y")
    assert result.returncode == 1 and "`sample.vae` is missing" in result.stderr


def test_outside_a_job_it_says_how_to_start_it(environment):
    del environment["SLURM_JOB_ID"]
    result = run(environment)
    assert result.returncode == 2 and "sbatch slurm/encode_latents.sh" in result.stderr


def test_the_script_is_plain_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPT)]).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(
        i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH")
    )  # later ones are ignored


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
def test_slurm_accepts_the_script():
    command = ["sbatch", "--test-only", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", str(SCRIPT)]
    assert subprocess.run(command).returncode == 0
