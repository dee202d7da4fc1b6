"""Collectives of the whole job. Every function is also valid in a single, uninitialised process.

Objects travel as JSON, never as pickles. Functions marked "collective" must be called by all ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class DistributedError(RuntimeError):
    """An error that all ranks raise together, with the messages of the ranks that failed."""


class RankError(RuntimeError):
    """An error of one rank alone, such as a damaged shard; the other ranks lose contact when it leaves."""


clock = time.monotonic
"""Seconds by which progress is judged: they never jump, whatever is done to the clock of the machine."""
_progress = clock()


def mark_progress() -> None:
    """Note that this rank is getting on; every collective here does it, and long local work should."""
    global _progress
    _progress = clock()


def seconds_without_progress() -> float:
    """Seconds since the last mark_progress()."""
    return clock() - _progress


def rank() -> int:
    """Index of this process in the job."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """Device of this rank: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


BEHIND_SECONDS = 30
"""The limit of a collective lies so far behind the watchdog's (faults.watched), which leaves the stacks of a rank."""


def init(timeout_seconds: int) -> bool:
    """Join the process group of the launcher (deepspeed, torchrun), or make one of a single rank.

    Args:
        timeout_seconds: longest wait in a collective, and BEHIND_SECONDS; afterwards the job ends with an error.

    Returns:
        Whether this call joined it; False when the process was in it already.

    Raises:
        RankError: the port of the rendezvous is taken.
    """
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ:  # plain `python`: a normal run of one rank
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    prepare_environment()
    import deepspeed

    try:
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds + BEHIND_SECONDS), verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        message = (
            f"port {os.environ['MASTER_PORT']} of this host, where the ranks would meet, is taken by another job. "
        )
        raise RankError(
            message + "Give another: `deepspeed --master_port N ...`, `torchrun --master_port N ...`."
        ) from error
    if device().type == "cpu":
        _unlink_shared_buffer()
    return True


def _unlink_shared_buffer() -> None:
    """Take the name of DeepSpeed's shared-memory buffer (66 MiB a rank) away; nothing else would ever free it.

    All ranks have mapped all buffers when the groups are there; the memory then goes with the last process, however
    that ends.
    """
    barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def prepare_environment() -> None:
    """Make DeepSpeed find what belongs to this Python environment, activated or not.

    Compiled operators get a cache of their own: environments that share one stall for minutes. ninja, which
    loads them, lies beside the interpreter.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def shutdown() -> None:
    """Leave the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if world_size() > 1:
        dist.barrier()
    mark_progress()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor. Collective."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    mark_progress()
    return tensor


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks (equal shapes), in rank order. Collective."""
    if world_size() == 1:
        mark_progress()
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    mark_progress()
    return gathered


def all_gather_into(out: Tensor, part: Tensor) -> Tensor:
    """The parts of all ranks (equal shapes), one after the other in `out`; returns it. Collective."""
    if world_size() == 1:
        out.copy_(part)
    else:
        dist.all_gather_into_tensor(out, part)
    mark_progress()
    return out


def all_gather_json(value: Any) -> list[Any]:
    """The plain values of all ranks, in rank order. Collective."""
    if world_size() == 1:
        mark_progress()
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device())
    sizes = all_gather(torch.tensor([data.numel()], device=device()))
    padded = torch.zeros(int(max(s.item() for s in sizes)), dtype=torch.uint8, device=device())
    padded[: data.numel()] = data
    parts = all_gather(padded)
    return [json.loads(bytes(p[: int(s.item())].tolist()).decode()) for p, s in zip(parts, sizes, strict=True)]


def broadcast_json(value: Any, source: int = 0) -> Any:
    """The plain value of rank `source`, on all ranks. Collective."""
    if world_size() == 1:
        return all_gather_json(value)[0]
    return all_gather_json(value if rank() == source else None)[source]


def assert_same_on_all_ranks(value: Any, what: str) -> None:
    """Compare a plain value over the ranks. Collective.

    Raises:
        DistributedError: on all ranks, when it differs, naming the ranks.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    digests = all_gather_json(hashlib.sha256(text.encode()).hexdigest())
    different = [r for r, d in enumerate(digests) if d != digests[0]]
    if different:
        raise DistributedError(
            f"{what} differs between rank 0 and ranks {different}: the ranks no longer agree. Nothing was changed."
        )


def raise_together(error: str | None) -> None:
    """Raise on all ranks when any rank reports an error, so that none is left waiting. Collective.

    Raises:
        DistributedError: with the message of every failed rank.
    """
    errors = all_gather_json(error)
    if any(e is not None for e in errors):
        lines = sorted({e for e in errors if e is not None})
        raise DistributedError("\n".join(lines))
