"""The only place that calls deepspeed.initialize, and the handle on what it returns."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig, TrainConfig
from entprune_ds.engine.balance import Cut, check_cut, cut_by_cost
from entprune_ds.engine.ds_config import full_ds_config, offloads, stages_at
from entprune_ds.engine.ema import ema_decay, new_ema, update_ema
from entprune_ds.engine.layer_costs import LayerCosts, measure_costs
from entprune_ds.engine.state import Piece, adam_step, pieces_of, write_state
from entprune_ds.engine.step_guard import StepGuard
from entprune_ds.engine.step_parts import StepParts
from entprune_ds.models.dit import DiT, initial_tensor
from entprune_ds.models.layers import Block, position_embedding
from entprune_ds.models.registry import parameter_shapes


@dataclass
class Engine:
    """A live DeepSpeed engine with the state that we keep beside it."""

    ds: Any
    """deepspeed.DeepSpeedEngine."""
    model_config: ModelConfig
    """Architecture now; kept_blocks is always explicit."""
    optimizer: torch.optim.Optimizer
    pieces: list[Piece]
    ema: dict[str, Tensor]
    layout: list[list[tuple[str, int, int]]]
    """Per rank its (name, start, stop) list: who holds what."""
    ema_count: int = 0
    """EMA updates since the start or the last resize."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Full shape of every parameter of the model, in its order, on whatever rank it lies."""
    cut: Cut | None = None
    """Blocks per pipeline stage; None without a pipeline."""
    costs: LayerCosts | None = None
    """What the layers of a pipeline cost, when it has been measured."""
    all_read: bool = False
    """Whether the stages between the first and the last need the examples too: for the teacher of their blocks."""
    gates: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Gates of soft pruning by original index of the block; see engine.gates."""
    parts: StepParts = field(default_factory=lambda: StepParts(comm.device().type == "cuda"))
    """Where the time of its steps goes."""
    guard: StepGuard = field(init=False)
    """Where an optimizer step can be left out."""
    batch_loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Mean loss of this rank's newest batch, without a pipeline."""

    def __post_init__(self) -> None:
        self.guard = StepGuard(self.optimizer)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the present blocks."""
        return self.model_config.blocks

    @property
    def depth(self) -> int:
        """Number of present blocks."""
        return len(self.model_config.blocks)

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks; all stages of one read the same examples."""
        return comm.world_size() // (len(self.cut) if self.cut else 1)

    @property
    def dp_rank(self) -> int:
        """This rank's data-parallel place; ranks are stage-major."""
        return comm.rank() % self.dp_size

    @property
    def pipe_stage(self) -> int:
        """This rank's pipeline stage; 0 without a pipeline."""
        return comm.rank() // self.dp_size

    @property
    def reads_data(self) -> bool:
        """Whether this rank's stage needs the examples: the first needs z_t, the last the target."""
        return self.cut is None or self.all_read or self.pipe_stage in (0, len(self.cut) - 1)

    @property
    def backbone(self) -> DiT:
        """The model that trains, or this pipeline stage's part of it."""
        return self.ds.module if self.cut is None else self.ds.module.part

    @property
    def adam_step(self) -> int:
        """Adam steps behind the moments."""
        return adam_step(self.pieces, self.optimizer)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the training forward pass."""
        return torch.bfloat16 if self.ds.bfloat16_enabled() else torch.float32

    def set_learning_rate(self, value: float) -> None:
        """Learning rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def update_ema(self, decay: float) -> None:
        """One EMA update after an optimizer step."""
        with self.parts.part("optimizer"):
            update_ema(self.ema, self.pieces, ema_decay(decay, self.ema_count))
        self.ema_count += 1


def build_engine(
    config: Config, model_config: ModelConfig, cut: Cut | None = None, costs: LayerCosts | None = None
) -> Engine:
    """Build the model at the depth of `model_config` and wrap it; weights are set by the caller. Collective.

    Args:
        cut: blocks per pipeline stage; None takes the best one by cost.
        costs: of the layers, when they are known; None measures them if there is no cut.
    """
    import deepspeed

    forget_garbage_of_imports()
    model_config = replace(model_config.keeping(model_config.blocks), weights="")
    stages = stages_at(config, comm.world_size(), len(model_config.blocks))
    if stages > 1 and cut is None:
        costs = costs or measure_costs(config, model_config, stages)
        cut = cut_by_cost(config, model_config, stages, comm.world_size() // stages, costs)
    check_cut(cut, stages, len(model_config.blocks))
    ds_config = full_ds_config(config, comm.world_size() // stages, len(model_config.blocks))
    devices = [comm.device()] if comm.device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model = _staged(model_config, cut) if cut is not None else _whole(model_config, ds_config)
        if model_config.compile:  # in place: the names of parameters stay, and equal blocks share one compiled code
            for block in model.modules():
                if isinstance(block, Block):
                    block.compile()
        optimizer = build_optimizer(model, config.train, offloads(ds_config))
        ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if ds.optimizer is optimizer:
        _keep_gradient_norm(ds)
    pieces, shapes = pieces_of(ds), parameter_shapes(model_config)
    layout = comm.all_gather_json([(p.name, p.start, p.stop) for p in pieces])
    return Engine(
        ds, model_config, optimizer, pieces, new_ema(pieces), layout, shapes=shapes, cut=cut, costs=costs,
        all_read=config.distill.kind == "features",
    )  # fmt: skip


def _keep_gradient_norm(ds: Any) -> None:
    """Let a plain optimizer (ZeRO-0 in fp32) clip as always, and keep the norm; DeepSpeed's wrappers of one do."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        ds._global_grad_norm = clip_grad_norm_(ds.module.parameters(), max_norm=ds.gradient_clipping(), mpu=ds.mpu)

    ds.clip_fp32_gradients = clip


def _whole(model_config: ModelConfig, ds_config: dict[str, Any]) -> DiT:
    """The whole model on every rank, or at ZeRO-3 partitioned while it is made."""
    import deepspeed

    deepspeed.utils.groups.mpu = None  # an earlier training in this process leaves the grid of its pipeline
    stage3 = ds_config["zero_optimization"]["stage"] == 3
    with NoInitialValues(), deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage3):
        model = DiT(model_config)
    if stage3:  # zero.Init casts even the sinusoids to 16 bit, and leaves buffers where they are
        model.pos_embed = position_embedding(model_config.hidden_size, model.side).to(comm.device())
    else:
        model.to(comm.device())
    return model


def _staged(model_config: ModelConfig, cut: Cut) -> torch.nn.Module:
    """This rank's pipeline stage."""
    from entprune_ds.engine.pipeline import StagedDiT, check_deepspeed_pipeline  # imports deepspeed

    check_deepspeed_pipeline()
    return StagedDiT(model_config, cut)


class NoInitialValues(TorchFunctionMode):
    """Modules are built without drawing values that somebody is about to overwrite."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


@functools.cache
def forget_garbage_of_imports() -> None:
    """Once, before the first engine: what exists now is never collected, so that a resize need not walk through it.

    A collection after the imports of torch and DeepSpeed takes 0.1 to 0.3 s, and DeepSpeed asks for up to four more
    while it builds an engine.
    """
    torch.compile(lambda: None)  # imports the compiler, half of all objects, as DeepSpeed would do a little later
    gc.collect()
    gc.freeze()


def build_optimizer(model: torch.nn.Module, train: TrainConfig, offload: bool) -> torch.optim.Optimizer:
    """Our own AdamW: fused on a GPU, DeepSpeed's vectorised one where the state lives in host memory."""
    settings: dict[str, Any] = dict(lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(model.parameters(), **settings)
    return torch.optim.AdamW(model.parameters(), fused=comm.device().type == "cuda", **settings)


def initialize_fresh(engine: Engine, seed: int) -> None:
    """Give a new engine its random initial weights, zero moments and an equal EMA. Collective."""

    def read(piece: Piece) -> dict[str, Tensor]:
        weight = initial_tensor(piece.name, piece.shape, seed).view(-1)[piece.start : piece.stop]
        return fresh_state(weight)

    write_state(engine.ds, engine.optimizer, engine.ema, 0, read)


def fresh_state(weight: Tensor) -> dict[str, Tensor]:
    """State of a weight that has never been trained: zero moments, EMA equal to it."""
    zero = torch.zeros_like(weight)
    return {"weight": weight, "exp_avg": zero, "exp_avg_sq": zero, "ema": weight}


def destroy_engine(engine: Engine) -> None:
    """Release everything an engine holds; DeepSpeed's own destroy() leaves hooks that keep it alive. Collective."""
    ds, module = engine.ds, engine.ds.module
    ds.destroy()
    if engine.cut is not None:
        from entprune_ds.engine.pipeline import release_pipeline

        release_pipeline(ds)
    engine.optimizer.state.clear()
    engine.optimizer.param_groups.clear()
    engine.pieces.clear()
    engine.ema.clear()
    engine.ds = None
    parts = [*module.parameters(), *module.modules()]
    if offload := vars(ds.optimizer).get("parameter_offload"):  # ZeRO-3; its coordinator remembers who came when
        parts += [offload, offload.get_param_coordinator()]
        _forget_stage3(module)
    for part in [*parts, ds.optimizer]:  # hooks, and at ZeRO-3 cycles that no collection sees through
        if isinstance(part, torch.nn.Parameter):
            part.grad = None
        vars(part).clear()
    del ds, module, part, parts, offload
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_stage3(root: torch.nn.Module) -> None:
    """Take a model out of what DeepSpeed keeps for the whole process: a list of roots, a cache by submodule."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    roots = parameter_offload.FWD_MODULE_STACK
    roots[:] = [module for module in roots if module is not root]
    cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in cached.__closure__ or ():  # the cache lies under the decorator that times it
        if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
            cell.cell_contents.cache_clear()
