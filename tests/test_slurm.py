"""slurm/encode_latents.sh, what all scripts of slurm/ share, and tools/local_slurm.sh, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entprune_ds.cli.encode import main
from tests.ranks import ROOT
from tests.test_diffusers import tiny_vae
from tests.test_encode import content, write_pixels

SCRIPT, PRUNE, SAMPLE = (ROOT / "slurm" / f"{name}.sh" for name in ("encode_latents", "prune_xl", "sample_fid"))
SCRIPTS = [SCRIPT, PRUNE, SAMPLE]
NO_CHECK = {"ENTPRUNE_CHECK_SECONDS": "0"}
LOCAL_SLURM = ROOT / "tools" / "local_slurm.sh"
CPU_ONLY = ("--gpus-per-node=0", "--cpus-per-task=1")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
RECORD = f"""#!{sys.executable}
import json, os, sys
if "entprune_ds.cli.slurm" in sys.argv:
    sys.exit(print(os.environ["RECORD"]))  # the run folder
with open(os.environ["RECORD"] + "/" + sys.argv[2] + os.environ["RANK"], "w") as file:
    values = {{key: os.environ[key] for key in {NUMBERS}}}
    json.dump([sys.argv[1:], values, os.environ["SLURMD_NODENAME"]], file)
"""


class Job:
    """One `sbatch slurm/SCRIPT`, submitted from the repository as a user does."""

    def __init__(self, slurm: dict[str, str], folder: Path, options, words, script: Path = SCRIPT):
        self.slurm, self.output = slurm | {"ENTPRUNE_LOGS": str(folder / "logs")}, folder / "job.out"
        command = ["sbatch", "--parsable", f"--output={self.output}", *options, str(script), *words]
        slurm = self.slurm
        self.id = subprocess.check_output(command, env=slurm, cwd=ROOT, text=True, timeout=60).strip()

    def facts(self) -> dict[str, str]:
        """What Slurm says of the job: JobState, ExitCode and more."""
        command = ["scontrol", "--oneliner", "show", "job", self.id]
        text = subprocess.check_output(command, env=self.slurm, text=True, timeout=60)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def wait(self, timeout: float = 240) -> tuple[str, str]:
        """(state, exit code) of the job when it has ended."""
        end = time.monotonic() + timeout
        while (facts := self.facts())["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING"):
            assert time.monotonic() < end, f"job is {facts['JobState']}: {facts['Reason']}\n{self.text()}"
            time.sleep(0.1)
        return facts["JobState"], facts["ExitCode"]

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "modules"),
    [(SCRIPT, ["encode"]), (PRUNE, ["train"]), pytest.param(SAMPLE, ["sample", "evaluate"], marks=pytest.mark.full)],
)
def test_every_word_arrives_unmangled_on_every_rank(slurm, tmp_path, script, modules):
    words = ["data.shards=/data/in-{0000..1023}.tar", "sample.out=a b", "sample.vae=$HOME/*", "x='\"", "", "--dry-run"]
    python = executable(tmp_path / "python", RECORD)
    variables = {"ENTPRUNE_PYTHON": python, "RECORD": str(tmp_path), **NO_CHECK}
    job = Job(slurm | variables, tmp_path, ["--nodes=2"], words, script)
    assert job.wait() == ("COMPLETED", "0:0"), job.text()
    port = str(20000 + int(job.id) % 12000)
    assert f"2 node(s) x 8 task(s), rendezvous 127.0.0.1:{port}" in job.text()
    same = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for module in modules:
        more = ["evaluate.samples=a b", "evaluate.out=a b.json"] if module == "evaluate" else []
        for rank in range(16):
            given, values, node = json.loads((tmp_path / f"entprune_ds.cli.{module}{rank}").read_text())
            assert given == ["-m", f"entprune_ds.cli.{module}", *words, *more]
            assert values == {"RANK": str(rank), "LOCAL_RANK": str(rank % 8), "OMP_NUM_THREADS": "8", **same}
            assert node == ("n1" if rank < 8 else "n2")


def test_a_rank_that_fails_ends_the_job_on_all_nodes(slurm, tmp_path):
    python = executable(tmp_path / "python", "#!/bin/bash\n[[ $RANK == 1 ]] && exit 3\nexec sleep 600\n")
    options = ["--nodes=2", "--ntasks-per-node=2", *CPU_ONLY]
    job = Job(slurm | {"ENTPRUNE_PYTHON": python, **NO_CHECK}, tmp_path, options, [])
    assert job.wait(60)[0] == "FAILED"
    assert "2 node(s) x 2 task(s)" in job.text() and "n1: task 1: Exited with exit code 3" in job.text()


def test_nodes_without_gpus_encode_what_one_process_encodes(slurm, tmp_path):
    pixels, vae = write_pixels(tmp_path / "pixels", 12, 3, size=64), tiny_vae(tmp_path / "vae")
    words = [f"data.shards={pixels}", f"sample.vae={vae}"]
    job = Job(slurm, tmp_path, ["--nodes=2", "--ntasks-per-node=1", *CPU_ONLY], [*words, f"out={tmp_path / 'job'}"])
    assert main([*words, f"out={tmp_path / 'one'}"]) == 0
    assert job.wait() == ("COMPLETED", "0:0"), job.text()
    assert content(tmp_path / "job") == content(tmp_path / "one")


@pytest.mark.full
@pytest.mark.timeout(1200)  # four jobs of up to four ranks
def test_a_job_that_is_cancelled_goes_on_after_its_last_finished_shard(slurm, tmp_path):
    """Also: no shard of one rank takes the name of another's, so 4 ranks on 2 nodes write what 1 rank writes."""
    pixels, vae = write_pixels(tmp_path / "pixels", 400, 1, size=64), tiny_vae(tmp_path / "vae")
    words = [f"data.shards={pixels}", f"sample.vae={vae}"]
    four = ["--nodes=2", "--ntasks-per-node=2", *CPU_ONLY]
    cut, parts = [*words, f"out={tmp_path / 'cut'}"], tmp_path / "cut" / "parts"
    job = Job(slurm, tmp_path, four, cut)
    while len(list(parts.glob("0*.json"))) < 8:
        assert job.facts()["JobState"] in ("PENDING", "RUNNING"), job.text()
        time.sleep(0.002)
    subprocess.run(["scancel", job.id], env=slurm, check=True, timeout=60)
    assert job.wait()[0] == "CANCELLED"
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("0*.json")}
    assert 8 <= len(finished) < 400 and not (tmp_path / "cut" / "index.json").exists()
    again = Job(slurm, tmp_path, four, cut)
    assert again.wait() == ("COMPLETED", "0:0"), again.text()
    assert {p.name: p.stat().st_mtime_ns for p in parts.glob("0*.json") if p.name in finished} == finished
    for name, options in {"whole": four, "one": ["--nodes=1", "--ntasks-per-node=1", *CPU_ONLY]}.items():
        job = Job(slurm, tmp_path, options, [*words, f"out={tmp_path / name}"])
        assert job.wait() == ("COMPLETED", "0:0"), job.text()
        assert content(tmp_path / name) == content(tmp_path / "cut")


FAKE_JOB = {"SLURM_JOB_ID": "4335987", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2"}


def run(script: Path, environment: dict[str, str], stand_ins: Path) -> subprocess.CompletedProcess:
    """A script outside Slurm, with stand-ins for srun (prints its words) and scontrol (knows nodes, not addresses)."""
    executable(stand_ins / "srun", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    executable(stand_ins / "scontrol", '#!/bin/bash\n[[ "$2" == hostnames ]] && printf "%s\\n" node07 node08\n')
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ENTPRUNE_"))}
    place = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "ENTPRUNE_LOGS": str(stand_ins / "logs")}
    command = ["bash", str(script), "out=x", "sample.out=x"]
    return subprocess.run(
        command, env=plain | place | NO_CHECK | environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_container_and_further_options_come_from_variables(tmp_path):
    """With a stand-in for srun, because its container options are pyxis's, which Slurm itself does not have."""
    variables = {"ENTPRUNE_CONTAINER": "/c/a b.sqsh", "ENTPRUNE_MOUNTS": "/data:/data", "ENTPRUNE_TASKS": "1"}
    result = run(SCRIPT, FAKE_JOB | variables | {"ENTPRUNE_SRUN": "--mpi=none --quiet"}, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "start 1: 2 node(s) x 1 task(s), rendezvous node07:23987" in lines[0]
    assert lines[1:9] == [
        "--ntasks-per-node=1", "--ntasks=2", "--kill-on-bad-exit=1", "--overlap",
        "--container-image=/c/a b.sqsh", "--container-mounts=/data:/data", "--mpi=none", "--quiet",
    ]  # fmt: skip


WRONG = {
    "SLURM_JOB_ID=": "sbatch slurm/{script}",
    "SLURM_JOB_ID=12a": "`SLURM_JOB_ID` is '12a'",
    "SLURM_JOB_NODELIST=": "`SLURM_JOB_NODELIST` is missing, though `SLURM_JOB_ID` is 4335987",
    "SLURM_JOB_NUM_NODES=3": "`SLURM_JOB_NUM_NODES` is 3, but `SLURM_JOB_NODELIST` (node[07-08]) names 2",
    "SLURM_STEP_ID=0": "Start it with: sbatch slurm/{script}",
    "SLURM_GPUS_PER_TASK=1": "Give --gpus-per-node",
    "ENTPRUNE_TASKS=two": "got 'two'. Set `ENTPRUNE_TASKS`",
    "SLURM_GPUS_ON_NODE=4 ENTPRUNE_TASKS=8": "8 tasks share 4 GPU(s)",
    "ENTPRUNE_TASKS=4 SLURM_CPUS_PER_TASK=8 SLURM_CPUS_ON_NODE=16": "need 32 CPUs of a node, but the job has 16",
    "ENTPRUNE_CHECK_SECONDS=1m": "`ENTPRUNE_CHECK_SECONDS` is '1m'",
    "ENTPRUNE_ROOT=/nowhere": "set `ENTPRUNE_ROOT`",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_missing_and_contradictory_variables_are_refused_before_anything_starts(tmp_path, script):
    for wrong, text in WRONG.items():
        result = run(script, FAKE_JOB | dict(w.split("=") for w in wrong.split()), tmp_path)
        assert result.returncode == 2 and text.format(script=script.name) in result.stderr, (wrong, result.stderr)
        assert result.stdout == ""  # srun was not called


@pytest.mark.parametrize("script", [*SCRIPTS, LOCAL_SLURM, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_the_scripts_are_plain_bash(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_every_option_of_the_scripts(script):
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert "#SBATCH" not in "".join(lines[first_command:])  # sbatch ignores those after the first command


def local_slurm(environment, *words) -> subprocess.CompletedProcess:
    return subprocess.run([LOCAL_SLURM, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_local_slurm_starts_once_and_refuses_other_settings(slurm):
    before = Path(slurm["SLURM_CONF"]).read_text()
    again = local_slurm(slurm, "up")
    assert (again.returncode, again.stdout) == (0, f"export SLURM_CONF={slurm['SLURM_CONF']}\n")
    assert Path(slurm["SLURM_CONF"]).read_text() == before
    assert local_slurm(slurm, "status").stdout == "2 node(s) with 64 CPU(s) and 8 GPU(s) up\n"
    other = local_slurm(slurm | {"LOCAL_SLURM_NODES": "3"}, "up")
    assert other.returncode == 1 and "local_slurm.sh down` first" in other.stderr and other.stdout == ""


def test_local_slurm_refuses_wrong_settings_and_folders_of_others(tmp_path):
    for setting, value in {"DIR": "here", "NODES": "two", "CPUS": "0", "GPUS": "-1"}.items():
        result = local_slurm(os.environ | {f"LOCAL_SLURM_{setting}": value}, "up")
        assert result.returncode == 1 and f"`LOCAL_SLURM_{setting}` is '{value}'" in result.stderr
    result = local_slurm(os.environ, "start")
    assert result.returncode == 1 and "one of: up, down" in result.stderr
    mine = Path(shutil.copytree(ROOT / "slurm", tmp_path / "mine"))
    result = local_slurm(os.environ | {"LOCAL_SLURM_DIR": str(mine)}, "down")
    assert result.returncode == 1 and "was not made by this script" in result.stderr and (mine / SCRIPT.name).exists()
    assert local_slurm(os.environ | {"LOCAL_SLURM_DIR": str(tmp_path / "none")}, "down").returncode == 0


@pytest.mark.full
@pytest.mark.parametrize("victims", [["slurmctld"], ["munged", "slurmd-n2"], ["slurmctld", "slurmd-n1", "slurmd-n2"]])
def test_local_slurm_ends_everything_after_a_crash(slurm, tmp_path, victims):
    """A second instance beside the first: it loses daemons while a job runs, comes back, and ends without a trace."""
    folder = Path(slurm["LOCAL_SLURM_DIR"]).with_name("crash")
    mine = slurm | {"LOCAL_SLURM_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    mine |= NO_CHECK
    mine["ENTPRUNE_PYTHON"] = executable(tmp_path / "python", "#!/bin/bash\nexec sleep 600\n")

    def crash():
        for name in victims:
            os.kill(int((folder / "pid" / name).read_text()), signal.SIGKILL)

    try:
        assert local_slurm(mine, "up").returncode == 0
        job = Job(mine, tmp_path, ["--nodes=2", "--ntasks-per-node=2", *CPU_ONLY], [])
        while processes(folder).count("sleep") < 4:
            assert job.facts()["JobState"] in ("PENDING", "RUNNING"), job.text()
        crash()
        assert local_slurm(mine, "status").stdout == f"{victims[0]} does not run\n"
        assert local_slurm(mine, "up").returncode == 0
        assert job.facts()["JobState"] in ("PENDING", "RUNNING")  # as Slurm had it on disk
        crash()
    finally:
        result = local_slurm(mine, "down")
    assert result.returncode == 0 and not folder.exists(), result.stderr
    end = time.monotonic() + 2  # the last step gives up its socket just before it ends
    while processes(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes(folder) == []
    assert local_slurm(slurm, "status").returncode == 0


def processes(folder: Path) -> list[str]:
    """Names of its living processes: daemons, steps and tasks have its slurm.conf in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            alive, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            if alive and bytes(folder / "slurm.conf") in environment:
                found.append((process / "comm").read_text().strip())
        except OSError:  # it has ended meanwhile
            continue
    return found
