"""Worker functions of test_comm.py: every collective once, in one launch."""

from __future__ import annotations

import torch

from entprune_ds import comm


def raised(function, *arguments) -> str:
    """The message of the DistributedError that a call raises, or the empty text."""
    try:
        function(*arguments)
    except comm.DistributedError as error:
        return str(error)
    return ""


def collectives() -> dict:
    """What every collective gives on this rank."""
    rank, size = comm.rank(), comm.world_size()
    value = {
        "rank": rank,
        "text": "ü" * (10 * rank),
        "list": [None, True, 1.5, "x" * 1000 * rank],
        "number": 0.1 + rank,
    }
    return {
        "joined_again": comm.init(timeout_seconds=60),
        "rank": rank,
        "size": size,
        "main": comm.is_main(),
        "device": str(comm.device()),
        "json": comm.all_gather_json(value),
        "same_length": comm.all_gather_json(rank),
        "empty": comm.all_gather_json("" if rank else None),
        "from_0": comm.broadcast_json({"rank": rank}),
        "from_1": comm.broadcast_json([rank] * (rank + 1), source=1),
        "sum": comm.all_reduce_sum(torch.tensor([1.0 + rank, 10.0 * rank], dtype=torch.float64)).tolist(),
        "tensors": [t.tolist() for t in comm.all_gather(torch.arange(6).view(2, 3).T[rank : rank + 2] + 100 * rank)],
        "same": raised(
            comm.assert_same_on_all_ranks, {"b": 1, "a": [2]} if rank else {"a": [2], "b": 1}, "the decision"
        ),
        "different": raised(comm.assert_same_on_all_ranks, {"kept": [0, rank]}, "the decision"),
        "nothing_failed": raised(comm.raise_together, None),
        "one_failed": raised(comm.raise_together, "the disk is full" if rank == 1 else None),
        "both_failed": raised(comm.raise_together, f"rank {rank} failed"),
        "alike_failed": raised(comm.raise_together, "no shard"),
        "still_alive": comm.all_gather_json(rank),
    }
