"""The row of the fault table that needs a cluster: a node of a real local Slurm dies while a job runs on two."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tools.fault_rows import HIT, Bench, Row
from tools.trials import ROOT, Trial, Unavailable, assert_same_end

NODE = "n2"
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable"]
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def local_slurm() -> Iterator[dict[str, str]]:
    """Environment in which sbatch finds a Slurm of two nodes that ends with this.

    Raises:
        Unavailable: Slurm is not installed.
    """
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        raise Unavailable("Slurm is not installed (as root: tools/local_slurm.sh install)")
    script, folder = str(ROOT / "tools" / "local_slurm.sh"), Path(tempfile.mkdtemp(prefix="entprune_"))
    path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    plain = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(("SLURM_", "SBATCH_"))}
    slurm = {"LOCAL_SLURM_DIR": str(folder / "s"), "SLURM_CONF": str(folder / "s" / "slurm.conf")}
    environment = (
        plain | path | slurm | {"PYTHONPATH": str(ROOT), "ENTPRUNE_PYTHON": sys.executable, "WANDB_MODE": "offline"}
    )
    try:
        subprocess.run([script, "up"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
        yield environment
    finally:
        subprocess.run([script, "down"], env=environment, check=True, timeout=120)
        folder.rmdir()


class Job(Trial):
    """A trial that Slurm starts, and starts again."""

    def submit(self, slurm: dict[str, str]) -> None:
        """sbatch slurm/prune_xl.sh."""
        self.slurm = slurm
        command = ["sbatch", *OPTIONS, f"--output={self.output}", str(ROOT / "slurm" / "prune_xl.sh"), *self.words]
        self.id = subprocess.check_output(command, env=slurm, cwd=ROOT, text=True, timeout=60).strip()

    def facts(self) -> dict[str, str]:
        """JobState, ExitCode, Restarts and more."""
        command = ["scontrol", "--oneliner", "show", "job", self.id]
        text = subprocess.check_output(command, env=self.slurm, text=True, timeout=60)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def wait_until(self, there, what: str, seconds: float = 1200) -> float:
        """Wait for something; returns the monotonic time."""
        end = time.monotonic() + seconds
        while not there():
            state = self.facts()
            over = state["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED") and not there()
            assert time.monotonic() < end and not over, f"{what} did not come: {state}\n{self.text[-3000:]}"
            time.sleep(0.2)
        return time.monotonic()

    def of_node(self, node: str) -> tuple[psutil.Process, list[psutil.Process]]:
        """The daemon of a node of this Slurm, and the processes of this job on it."""
        daemons, ours = list[psutil.Process](), list[psutil.Process]()
        for process in psutil.process_iter():
            try:
                words, values = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if "slurmd" in words[:1] and words[-2:] == ["-N", node] and self.slurm["SLURM_CONF"] in words:
                daemons.append(process)
            same = values.get("SLURM_JOB_ID") == self.id and values.get("SLURM_CONF") == self.slurm["SLURM_CONF"]
            if same and values.get("SLURMD_NODENAME") == node:
                ours.append(process)
        assert len(daemons) == 1 and ours, f"{len(daemons)} daemons of {node}, {len(ours)} processes of the job on it"
        return daemons[0], ours


def kill_node(bench: Bench) -> Row:
    """The daemon and all ranks of one node are gone at once; some time later the node comes back."""
    if not (ROOT / "slurm" / "prune_xl.sh").is_file():
        raise Unavailable("slurm/prune_xl.sh is missing")
    whole, folder = bench.whole, bench.root / "kill_node"
    folder.mkdir(exist_ok=True)
    with local_slurm() as slurm:
        job = Job(folder, "run", bench.data)
        job.submit(slurm | {"ENTPRUNE_LOGS": str(folder / "logs")})
        try:
            job.wait_until(lambda: job.reached() >= HIT, f"step {HIT}")
            daemon, ranks = job.of_node(NODE)
            words, start = daemon.cmdline(), time.monotonic()
            for process in (daemon, *ranks):
                process.send_signal(signal.SIGKILL)
            detect = job.wait_until(lambda: int(job.facts().get("Restarts", 0)) > 0, "the requeue") - start
            reached, back = job.reached(), time.monotonic()
            subprocess.run(words, env=slurm, check=True, timeout=60)  # the node is there again
            recover = job.wait_until(lambda: job.reached() > reached, f"a step beyond {reached}") - back
            job.wait_until(lambda: job.facts()["JobState"] == "COMPLETED", "the end")
        finally:
            subprocess.run(["scancel", job.id], env=slurm, timeout=60)
    assert_same_end(job, whole)
    said = "".join(path.read_text() for path in sorted((folder / "logs").rglob("*")) if path.is_file()) + job.text
    repeated = reached - int(re.findall(r"resumed from .*: step (\d+),", said)[-1])
    sent = f"SIGKILL to slurmd and all ranks of {NODE}, one of two nodes (local Slurm)"
    then = "the rank of the other node loses contact, the job requeues itself and goes on when the node is back"
    return Row(sent, detect, recover, repeated, then)
