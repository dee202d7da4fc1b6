"""Shared fixtures, once per session: digits shards, a local Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests run several processes on few cores
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

from entprune_ds.data.builtin import write_digits
from tests.ranks import ROOT

LAUNCHED = ("OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """Folder with train/ and val/ shards of digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, shard_size=64, seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """Environment in which sbatch finds a real Slurm of 2 nodes, n1 and n2, each said to have 64 CPUs and 8 GPUs."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("Slurm is not installed (as root: tools/local_slurm.sh install)")
    script, folder = str(ROOT / "tools" / "local_slurm.sh"), Path(tempfile.mkdtemp(prefix="entprune_"))
    plain = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(("SLURM_", "SBATCH_"))}
    size = {"LOCAL_SLURM_NODES": "2", "LOCAL_SLURM_CPUS": "64", "LOCAL_SLURM_GPUS": "8"}
    environment = plain | size | {"LOCAL_SLURM_DIR": str(folder / "s"), "SLURM_CONF": str(folder / "s" / "slurm.conf")}
    try:
        subprocess.run([script, "up"], env=environment, check=True, timeout=120)
        yield environment | {"PYTHONPATH": str(ROOT), "ENTPRUNE_PYTHON": sys.executable}
    finally:
        subprocess.run([script, "down"], env=environment, check=True, timeout=120)
        folder.rmdir()
