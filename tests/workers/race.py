"""Worker functions of test_race_ranks.py: run on every rank by tests.ranks."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from entprune_ds import comm, race_replicas
from entprune_ds.calibration import examples_of
from entprune_ds.config import Config, PruneConfig, RaceConfig
from entprune_ds.coordinator import measuring
from entprune_ds.diffusion.objective import Draws, build_objective
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.view import ShardedView
from entprune_ds.importance.scores import Score, Scores
from entprune_ds.race import hold_race, on_replicas
from entprune_ds.race_sharded import Sharded
from entprune_ds.race_trial import Recovery
from tests.tiny import tiny_config
from tests.workers.pipeline import train_steps
from tests.workers.resize import change_settings, public_state, settings
from tests.workers.resize_cost import Largest

LOSSES: Scores = {"loss": {b: Score(v, 0.0) for b, v in enumerate((0.3, 0.1, 0.4, 0.2))}}
"""Scores of the sweep, given instead of measured: it has tests of its own."""


def race_config(shards: str, zero_stage: int, dtype: str, stages: int = 1, **race: Any) -> Config:
    """The tiny config on digits, 4 -> 2 blocks in one check: three keep-sets, two steps each, then two of them more."""
    config = tiny_config(zero_stage, dtype, input_size=8, num_classes=10)
    given = dict(budget=0.5, candidates=3, first_steps=2, validation_draws=16) | race
    return replace(
        config,
        data=replace(config.data, shards=shards, shuffle_buffer=64),
        prune=PruneConfig(target_depth=2, criterion="recovery_race", num_checks=1),
        race=RaceConfig(**given),
        train=replace(config.train, micro_batch_size=2),
        parallel=replace(config.parallel, pipe_stages=stages),
    )


def started(config: Config) -> Engine:
    """An engine that has trained three steps, with settings unlike the config's."""
    engine = build_engine(config, config.model, (2, 2) if config.parallel.pipe_stages == 2 else None)
    initialize_fresh(engine, config.run.seed)
    train_steps(engine, config, 0, 3)
    change_settings(engine.optimizer)
    return engine


def inert(shards: str, zero_stage: int, dtype: str, stages: int, ways: list[str]) -> list[dict]:
    """Three steps, a race by each of the ways ("none" has none), three more; what each has found and left behind."""
    found, undisturbed = [], None
    for way in ways:
        config = race_config(shards, zero_stage, dtype, stages, replicas="auto" if way == "none" else way)
        engine, record, scores = started(config), {}, {}
        before, generator = settings(engine), torch.random.get_rng_state()
        if way != "none":
            m = measuring(ShardedView(engine), engine.kept_blocks, config, 0, examples_of(config, 0))
            race, engine = hold_race(engine, m, LOSSES, 3)
            record, scores = race.record, {b: s.value for b, s in race.scores["recovery_race"].items()}
        same = settings(engine) == before and engine.adam_step == 3 and engine.ema_count == 3
        same &= torch.equal(generator, torch.random.get_rng_state())
        losses = train_steps(engine, config, 3, 3)
        state = public_state(engine)
        undisturbed = undisturbed or (losses, state)
        same &= losses == undisturbed[0] and state.keys() == undisturbed[1].keys()
        same &= all(torch.equal(state[n], undisturbed[1][n]) for n in state)
        found.append({"record": record, "scores": scores, "same": same, "count": engine.ema_count})
        destroy_engine(engine)
    return found


class Watched(Largest):
    """Also the most bytes of tensors alive at the end of a step."""

    peak = 0

    def watch(self, share: float) -> None:
        gc.collect()
        tensors = {t.untyped_storage()._cdata: t for t in gc.get_objects() if isinstance(t, torch.Tensor)}
        self.peak = max(self.peak, sum(t.untyped_storage().nbytes() for t in tensors.values()))


def held(shards: str, ds_config: str) -> dict:
    """What a rank holds during sharded trials of a model of 16 blocks, at ZeRO-3."""
    config = race_config(shards, 3, "fp32")
    config = replace(config, model=replace(config.model, depth=16, hidden_size=64))
    config = replace(config, parallel=replace(config.parallel, ds_config=ds_config))
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    train_steps(engine, config, 0, 1)
    sizes = {n: math.prod(s) for n, s in engine.shapes.items()}
    m = measuring(ShardedView(engine), engine.kept_blocks, config, 0, examples_of(config, 0))
    recovery = Recovery(
        config, 0, 1, build_objective(config.model, config.diffusion), Draws(*m.draw("race/validation", 16))
    )
    with Watched() as seen:
        trials = Sharded(engine, recovery)
        trials.run([(0, 9), (1, 15)], 0, 2, seen.watch)
        trials.restored()
    return {
        "whole": sum(sizes.values()),
        "block": sum(size for name, size in sizes.items() if name.startswith("blocks.0.")),
        "partition": max(sum(stop - start for _, start, stop in ranges) for ranges in trials.start.layout),
        "peak": seen.peak,
        "made": seen.made,
    }


def no_room(shards: str) -> dict:
    """How a race is held whose candidates do not fit on rank 1, and what it says when it must hold them there."""
    config = race_config(shards, 1, "fp32")
    engine, wants = started(config), {}
    for free in (10**12, 1000):
        mine = free if comm.rank() == 1 else 10**12
        with mock.patch.object(race_replicas, "free_host_memory", return_value=mine):
            wants[str(free)] = on_replicas(engine, config, 3)
            if free == 1000:
                try:
                    on_replicas(engine, replace(config, race=replace(config.race, replicas="true")), 3)
                except comm.DistributedError as error:
                    wants["said"] = str(error)
    return wants


def hopeless(shards: str, replicas: str) -> str:
    """What a race says whose every candidate ends in NaN."""
    config = race_config(shards, 1, "fp32", replicas=replicas, learning_rate=1e30)
    engine = started(config)
    m = measuring(ShardedView(engine), engine.kept_blocks, config, 0, examples_of(config, 0))
    try:
        hold_race(engine, m, LOSSES, 3)
    except comm.DistributedError as error:
        return str(error)
    return ""
