"""Run a function in several real processes joined by gloo, with a time limit.

    results = run_ranks("tests.workers.resize:check", world_size=2, folder=str(tmp_path), zero_stage=3)

The function is called as f(**arguments) on every rank after comm.init() and returns plain JSON values.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class RankFailure(AssertionError):
    """A rank failed or ran out of time; the message holds the output of all ranks."""


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment of one rank, as a launcher would set it."""
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline",
    }  # fmt: skip


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(target: str, world_size: int, timeout: float = 240, **arguments: Any) -> list[Any]:
    """Call `module:function` on every rank; returns the results in rank order.

    Raises:
        RankFailure: when a rank exits with an error or the time limit passes.
    """
    with tempfile.TemporaryDirectory() as folder:
        port, processes, outputs = free_port(), [], []
        for rank in range(world_size):
            out = open(Path(folder) / f"output_{rank}", "w+b")  # noqa: SIM115
            command = [
                sys.executable,
                "-m",
                "tests.ranks",
                target,
                str(Path(folder) / f"result_{rank}"),
                json.dumps(arguments),
            ]
            env = rank_environment(rank, world_size, port)
            processes.append(
                subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True)
            )
            outputs.append(out)
        try:
            codes = [p.wait(timeout) for p in processes]
        except subprocess.TimeoutExpired:
            codes = [-1 if p.poll() is None else p.poll() for p in processes]
        finally:
            for p in processes:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                    p.wait()
        if any(codes):
            text = []
            for rank, out in enumerate(outputs):
                out.seek(0)
                text.append(f"--- rank {rank} (exit {codes[rank]}) ---\n{out.read().decode(errors='replace')[-4000:]}")
            raise RankFailure("\n".join(text))
        return [json.loads((Path(folder) / f"result_{rank}").read_text()) for rank in range(world_size)]


def _main() -> None:
    target, result, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    import torch

    from entprune_ds import comm
    from entprune_ds.cli.common import leave

    torch.set_num_threads(1)
    module, function = target.split(":")
    comm.init(timeout_seconds=120)
    value = getattr(importlib.import_module(module), function)(**arguments)
    result.write_text(json.dumps(value))
    comm.barrier()
    comm.shutdown()
    leave(0)


if __name__ == "__main__":
    _main()
