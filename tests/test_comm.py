"""Collectives: valid alone, equal on all ranks of a real job, and errors that all ranks raise together."""

from __future__ import annotations

import os
import socket
import sys

import pytest
import torch

from entprune_ds import comm
from tests.ranks import run_ranks


@pytest.fixture
def alone(monkeypatch) -> None:
    """A process outside of any job."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not torch.distributed.is_initialized()


# ---------------------------------------------------------------- alone


def test_a_single_process_is_a_job_of_one_rank(alone):
    assert (comm.rank(), comm.world_size(), comm.is_main()) == (0, 1, True)
    comm.barrier()
    comm.shutdown()


def test_a_port_that_is_taken_is_named_with_the_remedy(alone, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        group = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(comm.RankError, match=f"port {port} of this host.* is taken.*--master_port N"):
            comm.init(timeout_seconds=30)
    assert not torch.distributed.is_initialized()


def test_collectives_of_one_rank_return_what_they_get(alone):
    value = {"a": [1, None, "x"]}
    assert comm.all_gather_json(value) == [value] and comm.broadcast_json(value) == value
    tensor = torch.arange(3)
    assert comm.all_reduce_sum(tensor) is tensor and tensor.tolist() == [0, 1, 2]
    assert [t.tolist() for t in comm.all_gather(tensor)] == [[0, 1, 2]]


def test_errors_of_one_rank_are_raised(alone):
    comm.assert_same_on_all_ranks({"any": "value"}, "this")
    comm.raise_together(None)
    with pytest.raises(comm.DistributedError, match=r"^the disk is full$"):
        comm.raise_together("the disk is full")
    with pytest.raises(comm.DistributedError):
        comm.raise_together("")  # an empty message is an error too


def test_the_launcher_names_the_rank_before_the_group_exists(alone, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert comm.rank() == 3 and not comm.is_main() and comm.world_size() == 1


def test_a_process_that_has_not_joined_broadcasts_to_itself(alone, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert comm.broadcast_json("value") == "value"


def test_values_come_back_alike_with_one_rank_and_with_several(alone):
    assert comm.all_gather_json({1: (2, 3)}) == [{"1": [2, 3]}]  # as JSON makes them


def test_programs_beside_the_interpreter_are_found(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    comm.prepare_environment()
    beside = os.path.dirname(sys.executable)
    assert os.environ["PATH"].split(os.pathsep) == [beside, "/usr/bin"]
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(sys.prefix)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/mine")
    comm.prepare_environment()
    assert (
        os.environ["PATH"].split(os.pathsep) == [beside, "/usr/bin"] and os.environ["TORCH_EXTENSIONS_DIR"] == "/mine"
    )


# ---------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What tests/workers/comm.py found on two real ranks."""
    return run_ranks("tests.workers.comm:collectives", world_size=2, timeout=120)


def test_ranks_know_their_place(ranks):
    assert [(r["rank"], r["size"], r["main"]) for r in ranks] == [(0, 2, True), (1, 2, False)]
    assert [r["joined_again"] for r in ranks] == [False, False]


def test_plain_values_of_any_length_reach_all_ranks_in_rank_order(ranks):
    expected = [
        {"rank": i, "text": "ü" * 10 * i, "list": [None, True, 1.5, "x" * 1000 * i], "number": 0.1 + i} for i in (0, 1)
    ]
    for result in ranks:
        assert result["json"] == expected
        assert result["same_length"] == [0, 1] and result["empty"] == [None, ""]
        assert result["from_0"] == {"rank": 0} and result["from_1"] == [1, 1]


def test_tensors_are_summed_and_gathered(ranks):
    table = [[0, 3], [1, 4], [2, 5]]
    expected = [table[0:2], [[n + 100 for n in row] for row in table[1:3]]]
    for result in ranks:
        assert result["sum"] == [3, 10] and result["tensors"] == expected


def test_a_difference_between_ranks_is_raised_on_all_of_them(ranks):
    for result in ranks:
        assert result["same"] == ""
        assert result["different"].startswith("the decision differs between rank 0 and ranks [1]")


def test_the_error_of_one_rank_is_raised_on_all_of_them(ranks):
    for result in ranks:
        assert result["nothing_failed"] == "" and result["one_failed"] == "the disk is full"
        assert result["both_failed"] == "rank 0 failed\nrank 1 failed" and result["alike_failed"] == "no shard"


def test_the_ranks_go_on_together_after_an_error(ranks):
    assert [r["still_alive"] for r in ranks] == [[0, 1], [0, 1]]
