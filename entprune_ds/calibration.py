"""Calibration examples of a pruning check, read apart from the training."""

from __future__ import annotations

from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.coordinator import Examples
from entprune_ds.data.stream import Stream


def examples_of(config: Config, check: int) -> Examples:
    """Calibration examples by purpose, equal on all ranks and apart from the training cursor."""
    streams: dict[str, Stream] = {}

    def examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        if purpose not in streams:
            streams[purpose] = Stream(
                config.data.shards, seed=config.run.seed, num_readers=1, shuffle_buffer=config.data.shuffle_buffer,
                global_batch_size=count, purpose=f"{purpose}/{check}", flip=config.data.flip,
                latent_scale=config.data.latent_scale, max_skipped=config.data.max_skipped,
                allow_pipe=config.data.allow_pipe,
            )  # fmt: skip
        try:
            batch = streams[purpose].next_batch()
        except (ValueError, OSError) as problem:
            raise comm.RankError(f"calibration: {problem}") from problem
        return batch.latents, batch.labels

    return examples
