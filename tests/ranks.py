"""Run a function in several real processes joined by gloo, with a time limit.

    results = run_ranks("tests.workers.resize:check", world_size=2, folder=str(tmp_path), zero_stage=3)

The function is called as f(**arguments) on every rank after comm.init() and returns plain JSON values. Ranks are forked
from one process that has imported torch and DeepSpeed (five seconds of a core, each time) and never does anything else.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1


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
        port, ranks = free_port(), range(world_size)
        environments = [rank_environment(rank, world_size, port) for rank in ranks]
        codes = _ask(target=target, folder=folder, timeout=timeout, environments=environments, arguments=arguments)
        if any(codes):
            texts = [Path(folder, f"output_{rank}").read_text(errors="replace")[-4000:] for rank in ranks]
            raise RankFailure("\n".join(f"--- rank {r} (exit {codes[r]}) ---\n{texts[r]}" for r in ranks))
        return [json.loads(Path(folder, f"result_{rank}").read_text()) for rank in ranks]


@cache
def _server() -> subprocess.Popen:
    """The process that forks; it ends with this one, and its ranks with it."""
    command, pipe = [sys.executable, "-m", "tests.ranks", str(os.getpid())], subprocess.PIPE
    untouched = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # CUDA must not start before a fork
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | untouched
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)


def _ask(**request: Any) -> list[int]:
    """Exit codes of the ranks; -1 for those that ran out of time."""
    server = _server()
    try:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    except BaseException:  # interrupted: the next call gets a new one
        server.kill()
        _server.cache_clear()
        raise


def _serve(parent: int) -> None:
    _die_with(parent)
    from entprune_ds import comm

    comm.prepare_environment()
    import entprune_ds.trainer  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    for line in sys.stdin:
        request = json.loads(line)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: a fork would leave their locks taken"
        me, environments = os.getpid(), request["environments"]
        pids = [_fork(me, rank, request) for rank in range(len(environments))]
        print(json.dumps(_wait(pids, request["timeout"])), file=replies, flush=True)


def _wait(pids: list[int], timeout: float) -> list[int]:
    """Exit codes; what is left at the time limit is killed and has -1."""
    codes, end = dict[int, int](), time.monotonic() + timeout
    while len(codes) < len(pids) and time.monotonic() < end:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            codes[done] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for pid in set(pids) - set(codes):
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid, -1) for pid in pids]


def _fork(parent: int, rank: int, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        _die_with(parent)
        output = os.open(f"{request['folder']}/output_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(request["environments"][rank])
        _be_rank(request["target"], Path(request["folder"], f"result_{rank}"), request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _be_rank(target: str, result: Path, arguments: dict[str, Any]) -> NoReturn:
    import torch

    from entprune_ds import comm
    from entprune_ds.cli.common import leave

    torch.set_num_threads(1)
    comm.mark_progress()
    module, function = target.split(":")
    comm.init(timeout_seconds=120)
    value = getattr(importlib.import_module(module), function)(**arguments)
    result.write_text(json.dumps(value))
    comm.barrier()
    comm.shutdown()
    leave(0)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
