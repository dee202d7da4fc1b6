"""The model as pipeline stages under DeepSpeed's PipelineEngine; parameters keep the names of the whole model.

Layers are the stem, the blocks and the head. A cut says how many blocks each stage holds; the stem is on the first
stage, the head on the last. The stem computes the conditioning c once; between stages it travels with the tokens, as
one more token, so that every stage has one input, one output and one backward pass.

Ranks are stage-major: rank = pipe_stage x data-parallel size + data-parallel rank.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import module as ds_module
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups as ds_groups
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.config import ModelConfig
from entprune_ds.engine.balance import Cut
from entprune_ds.engine.state import TESTED_DEEPSPEED
from entprune_ds.engine.step_parts import StepParts, timed
from entprune_ds.models.dit import DiT
from entprune_ds.models.layers import position_embedding

GROUPS = ("ds_model_proc_group", "dp_proc_group", "pp_proc_group", "slice_proc_group")
"""Process groups that a PipelineModule's grid makes and nothing destroys; the fifth is the module's world_group."""
PART_OF = {
    schedule.LoadMicroBatch: "data", schedule.ForwardPass: "forward", schedule.BackwardPass: "backward",
    schedule.OptimizerStep: "optimizer",
}  # fmt: skip
"""Parts of a step by DeepSpeed's instruction; the others move data between ranks."""
NEEDED: dict[Any, tuple[str, ...]] = {
    PipelineModule: ("_partition_layers", "_build", "_set_bounds", "_index_tied_modules", "forward"),
    ds_module.PipelineParallelGrid: ("get_stage_id", "get_data_parallel_id", "get_model_parallel_group"),
    PipelineEngine: ("train_batch", "_aggregate_total_loss", "set_dataiterator", "_INSTRUCTION_MAP"),
    p2p: ("_grid", "_groups"),
    ds_groups: ("mpu",),
}


def check_deepspeed_pipeline() -> None:
    """Refuse a DeepSpeed whose pipeline differs from the one this file was written for.

    Raises:
        DistributedError: naming the missing attributes and the tested version; on all ranks, which run the same one.
    """
    missing = [f"{owner.__name__}.{n}" for owner, names in NEEDED.items() for n in names if n not in vars(owner)]
    if missing:
        import deepspeed

        raise comm.DistributedError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}. Install deepspeed=={TESTED_DEEPSPEED}, "
            "the version that pipelines are tested with."
        )


class StagedDiT(PipelineModule):
    """One stage of a DiT: the stem on the first stage, some blocks, the head on the last.

    Args:
        config: architecture; kept_blocks are all blocks of the whole model.
        cut: blocks per stage, checked by balance.check_cut.
    """

    def __init__(self, config: ModelConfig, cut: Cut):
        self.config, self.cut = config, cut
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology
            super().__init__(layers=["stem", *config.blocks, "head"], num_stages=len(cut))

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the stem."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the head."""
        return self.stage_id == self.num_stages - 1

    def _partition_layers(self, method: str = "") -> None:
        """Our cut in place of DeepSpeed's; bounds count the stem and the head as layers."""
        bounds = [0] + [1 + sum(self.cut[: i + 1]) for i in range(len(self.cut) - 1)] + [len(self.config.blocks) + 2]
        self.parts = bounds
        self._set_bounds(start=bounds[self.stage_id], stop=bounds[self.stage_id + 1])

    def _build(self) -> None:
        """Allocate this stage's layers only, with zeros: the caller writes the weights."""
        first = sum(self.cut[: self.stage_id])
        mine = self.config.blocks[first : first + self.cut[self.stage_id]]
        with torch.device("meta"):
            part = DiT(self.config.keeping(mine))
        if not self.is_first:
            del part.x_embedder, part.t_embedder, part.y_embedder, part.pos_embed
        if not self.is_last:
            del part.final_layer
        part.to_empty(device=comm.device())
        if self.is_first:
            part.pos_embed = position_embedding(self.config.hidden_size, part.side).to(comm.device())
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]
            parameter.model_parallel = True  # type: ignore[attr-defined]  # else the norm without ZeRO is stage 0's
        self.part = part

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under the names of the whole model."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.removeprefix("part."), parameter

    def forward(self, inputs: Any) -> Tensor:
        """(z_t, t, labels) on the first stage, else (N,T+1,D) -> (N,T+1,D), on the last stage the prediction.

        Token T is the conditioning c (N,D).
        """
        x, c = self.part.embed(*inputs) if self.is_first else (inputs[:, :-1].contiguous(), inputs[:, -1])
        x = self.part.run_blocks(x, c)
        return self.part.head(x, c) if self.is_last else torch.cat([x, c.unsqueeze(1)], dim=1)


def train_batch(
    ds: Any, micro_batches: list, dtype: torch.dtype, loss_fn: Callable[..., Tensor], parts: StepParts
) -> Tensor:
    """One optimizer step of a PipelineEngine; first and last stage read the same draws, those between none.

    Returns:
        Mean loss of this data-parallel rank, equal on all of its stages.
    """

    def columns() -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        for draws in micro_batches:
            moved = draws.to(comm.device(), dtype)
            yield (moved.z_t, moved.t, moved.labels), moved.wanted

    ds.module.loss_fn = lambda prediction, wanted: loss_fn(prediction, *wanted).mean()
    ds._INSTRUCTION_MAP = {  # in place of the one of its class
        kind: timed(parts, PART_OF.get(kind, "communication"), call)
        for kind, call in PipelineEngine._INSTRUCTION_MAP.items()
    }
    ds.train_batch(columns())
    return ds.dp_group_loss


def release_pipeline(ds: Any) -> None:
    """Let go of what a destroyed PipelineEngine leaves behind: buffers, p2p grid, process groups. Collective."""
    module, grid = ds.module, ds.grid
    ds.data_iterator = ds.loss = ds.total_loss = None
    module.loss_fn = None
    ds.pipe_buffers.clear()
    ds.reset_activation_shape()
    p2p._grid = p2p._groups = ds_groups.mpu = None
    gc.collect()
    comm.barrier()  # nobody is still inside one of them
    for group in [module.world_group, *(getattr(grid, name) for name in GROUPS)]:
        dist.destroy_process_group(group)
