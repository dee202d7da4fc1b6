"""Worker function of test_score_command.py: a training that waits between removals, then the command on its ranks."""

from __future__ import annotations

from entprune_ds.cli.score import main as score
from entprune_ds.cli.train import main as train


def train_and_score(training: list[str], scoring: list[str]) -> list[int]:
    """Exit statuses of both."""
    return [train(training), score(scoring)]
