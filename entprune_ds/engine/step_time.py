"""Time of an optimizer step at other depths, from the measured times of the layers: the third voter of a check."""

from __future__ import annotations

from collections.abc import Callable

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.balance import cut_by_cost, stage_costs
from entprune_ds.engine.build import Engine
from entprune_ds.engine.ds_config import batch_plan, stages_at
from entprune_ds.engine.layer_costs import LayerCosts, measure_costs


def step_timer(engine: Engine, config: Config) -> Callable[[tuple[int, ...]], float]:
    """A function kept_blocks -> seconds of an optimizer step, equal on all ranks.

    Its first call is collective: it times the layers on every rank and takes the median (unless the engine of a
    pipeline knows their times), without touching the training.
    """
    known: list[LayerCosts] = []

    def seconds(kept_blocks: tuple[int, ...]) -> float:
        if not known:
            stages, costs = len(engine.cut or (0,)), engine.costs
            fresh = costs is not None and costs.know(config, engine.model_config, engine.dp_size)
            known.append(costs if costs is not None and fresh else measure_costs(config, engine.model_config, stages))
        return step_seconds(config, engine.model_config.keeping(kept_blocks), comm.world_size(), known[0])

    return seconds


def step_seconds(config: Config, model_config: ModelConfig, world_size: int, costs: LayerCosts) -> float:
    """Seconds of the forward and backward passes of one optimizer step. A pure function.

    Micro-batches x layers; on a pipeline that of its slowest stage at the best cut, for every micro-batch and once
    more for each further stage. The optimizer and the traffic are left out: they are not measured.

    Args:
        model_config: the blocks that the step is for.
        costs: of the layers; a micro-batch of another size is taken to cost in proportion.
    """
    stages = stages_at(config, world_size, len(model_config.blocks))
    micro, micro_batches = batch_plan(config, world_size // stages, len(model_config.blocks))
    if stages == 1:
        nanoseconds = sum(costs.of_layers(model_config)) * micro_batches
    else:
        cut = cut_by_cost(config, model_config, stages, world_size // stages, costs)
        nanoseconds = max(stage_costs(costs, model_config, cut)) * (micro_batches + stages - 1)
    return nanoseconds / 1e9 * micro / costs.micro_batch
