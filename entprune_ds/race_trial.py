"""What all trials of a recovery race share: the same draws, learning rates and validation draws for every candidate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.data.stream import Stream
from entprune_ds.diffusion.objective import Draws, Objective
from entprune_ds.learning_rate import learning_rate
from entprune_ds.race_plan import trial_batch


@dataclass(frozen=True)
class Recovery:
    """Recovery steps 0, 1, ... of a race; step i is the same for every candidate, executor and number of ranks.

    Draws come from the training shards in an order of the race's own: the training cursor and its randomness stay.
    """

    config: Config
    check: int
    step: int
    """Optimizer steps done by the run."""
    objective: Objective
    validation: Draws
    """Fixed draws that judge, equal on all ranks; not among those of the validation set, which stays unseen."""
    cursors: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    """Where the stream stands after a step, for each (step, data-parallel rank, data-parallel size) reached so far."""

    @property
    def purpose(self) -> str:
        """Name of the race's random streams."""
        return f"race/{self.check}"

    def learning_rate(self, i: int) -> float:
        """Learning rate of recovery step i: the run's, which has its warm-up behind it, unless another is asked for.

        What few and small steps say is little more than the damage right after the removal.
        """
        train, chosen = self.config.train, self.config.race.learning_rate
        step = min(max(self.step, train.warmup_steps) + i, train.num_steps - 1)
        return learning_rate(train, step) if chosen is None else chosen

    def draws(self, start: int, stop: int, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Draws]:
        """This data-parallel rank's part of steps start .. stop - 1, one Draws a step.

        Raises:
            RankError: when a shard cannot be read.
        """
        config = self.config
        stream = Stream(
            config.data.shards, seed=config.run.seed, num_readers=config.data.num_readers,
            shuffle_buffer=config.data.shuffle_buffer, global_batch_size=trial_batch(config), dp_rank=dp_rank,
            dp_size=dp_size, purpose=self.purpose, flip=config.data.flip, latent_scale=config.data.latent_scale,
            max_skipped=config.data.max_skipped, allow_pipe=config.data.allow_pipe,
        )  # fmt: skip
        if start:
            stream.load_state(self.cursors[start, dp_rank, dp_size])
        for step in range(start, stop):
            try:
                batch = stream.next_batch()
            except (ValueError, OSError) as problem:
                raise comm.RankError(f"recovery race: {problem}") from problem
            yield self.objective.make_draws(
                batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose=self.purpose, step=step,
                label_dropout=config.train.label_dropout, null_label=config.model.num_classes,
            )  # fmt: skip
        self.cursors[stop, dp_rank, dp_size] = stream.state()


def micro_batch(wanted: int | None, examples: int) -> int:
    """The largest micro-batch that divides the examples of a rank and is not above the one that is trained with."""
    most = min(wanted or examples, examples)
    return next(m for m in range(most, 0, -1) if examples % m == 0)


def trial_config(config: Config, dp_size: int | None) -> Config:
    """The config of a sharded candidate: a batch of its own, in micro-batches for this data-parallel size if known."""
    batch = trial_batch(config)
    micro = None if dp_size is None else micro_batch(config.train.micro_batch_size, batch // dp_size)
    train = replace(config.train, global_batch_size=batch, micro_batch_size=micro)
    return replace(config, train=train, prune=replace(config.prune, regrow_micro_batch=False))
