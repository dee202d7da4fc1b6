"""Shared fixtures: digits shards, written once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests run several processes on few cores
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

from entprune_ds.data.builtin import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """Folder with train/ and val/ shards of digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, shard_size=64, seed=0)
    return str(folder)
