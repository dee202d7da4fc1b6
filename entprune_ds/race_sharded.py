"""Trials on any topology: all ranks train one candidate after the other, sharded as the run itself is.

The run's state waits in host memory meanwhile, each rank its own partition; so does the state that each candidate goes
on with. No rank ever holds a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.diffusion.objective import Draws
from entprune_ds.engine.build import Engine, build_engine, destroy_engine
from entprune_ds.engine.ds_config import stages_at
from entprune_ds.engine.train_step import train_step
from entprune_ds.engine.transfer import ParkedPiece, Range, fill, park
from entprune_ds.engine.view import ShardedView
from entprune_ds.pruning.halving import KeepSet
from entprune_ds.race_trial import Recovery, trial_config
from entprune_ds.validation import validation_loss


class ParkedEngine:
    """All that an engine has learned, parked in host memory. Making one spends the engine. Collective."""

    def __init__(self, engine: Engine):
        self.model_config, self.cut, self.costs = engine.model_config, engine.cut, engine.costs
        self.ema_count, self.adam_step, self.layout = engine.ema_count, engine.adam_step, engine.layout
        self.settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
        self.pieces: list[ParkedPiece] = park(engine, engine.shapes, torch.device("cpu"), {})
        destroy_engine(engine)

    def into(self, engine: Engine) -> Engine:
        """Fill a fresh engine of the same blocks, or of fewer; the parked state stays. Collective."""
        for group, values in zip(engine.optimizer.param_groups, self.settings, strict=True):
            group.update(values)
        held: list[list[Range]] = self.layout
        fill(engine, self.pieces, held, self.adam_step)
        return engine


class Sharded:
    """Trials of one candidate at a time on all ranks. Collective, like every method."""

    def __init__(self, engine: Engine, recovery: Recovery):
        """`engine` is spent; `restored` gives another one in its place."""
        self.recovery, self.start = recovery, ParkedEngine(engine)
        self.going_on: dict[KeepSet, ParkedEngine] = {}

    def run(self, keep_sets: list[KeepSet], start: int, stop: int, watch: Callable[[float], None]) -> list[float]:
        """pruning.halving.Trial; `watch` learns which share of the round is done."""
        self.going_on = {kept: state for kept, state in self.going_on.items() if kept in keep_sets}
        losses = []
        for place, kept in enumerate(keep_sets):
            engine = self._candidate(kept, self.going_on[kept] if start else self.start)
            for i, draws in enumerate(self._draws(engine, start, stop), start):
                engine.set_learning_rate(self.recovery.learning_rate(i))
                train_step(engine, draws, self.recovery.objective.loss)
                comm.mark_progress()
                watch((place + (i + 1 - start) / (stop - start)) / len(keep_sets))
            losses.append(validation_loss(ShardedView(engine), self.recovery.validation, self.recovery.objective))
            self.going_on[kept] = ParkedEngine(engine)
        return losses

    def restored(self) -> Engine:
        """The engine of the run as it was, to the bit."""
        self.going_on.clear()
        state = self.start
        engine = state.into(build_engine(self.recovery.config, state.model_config, state.cut, state.costs))
        engine.ema_count = state.ema_count
        return engine

    def _candidate(self, kept: KeepSet, state: ParkedEngine) -> Engine:
        model = self.start.model_config.keeping(kept)
        config, cut = candidate_layout(self.recovery.config, model)
        return state.into(build_engine(config, model, cut))

    def _draws(self, engine: Engine, start: int, stop: int) -> Iterator[list[Draws]]:
        """Micro-batches of every step, none in the middle of a pipeline."""
        if not engine.reads_data:
            return ([] for _ in range(start, stop))
        size = engine.ds.train_micro_batch_size_per_gpu()
        return (d.split(size) for d in self.recovery.draws(start, stop, engine.dp_rank, engine.dp_size))


def candidate_layout(config: Config, model: ModelConfig) -> tuple[Config, tuple[int, ...] | None]:
    """Config and even cut of a candidate: a short trial is not worth measuring what its layers cost."""
    depth, world_size = len(model.blocks), comm.world_size()
    stages = stages_at(trial_config(config, None), world_size, depth)
    cut = tuple(depth // stages + (stage < depth % stages) for stage in range(stages))
    return trial_config(config, world_size // stages), cut if stages > 1 else None
