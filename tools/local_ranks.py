"""Ranks of a benchmark on this machine: started, waited for, and none left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_ranks(command: list[str], world_size: int, threads: int, result: Path, seconds: float) -> Any:
    """Run a command as every rank of a job; the JSON value that its rank 0 has written to `result`.

    Args:
        command: words of the command, which knows `result`; its folder takes the logs.
        world_size: ranks.
        threads: of each rank.
        result: file.
        seconds: longest time that a rank may take.

    Raises:
        RuntimeError: a rank has failed, with the ends of all logs.
        subprocess.TimeoutExpired: a rank takes too long.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with open(result.with_name(f"log_{rank}"), "w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [p.wait(seconds) for p in processes]
    finally:  # of ranks that wait for a dead one
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError("\n".join(result.with_name(f"log_{r}").read_text()[-3000:] for r in range(world_size)))
    return json.loads(result.read_text())
