"""What a teacher takes on a rank beside the training: its weights, and what waits for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.balance import layer_parameters
from entprune_ds.estimate import plan_of


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of one rank, of the stage that needs most."""

    weights: int
    """Stem, head, this rank's part of the blocks, and the gathered one."""
    activations: int
    """Streams and kept hidden states of all micro-batches of a step, and what a block works with."""

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.activations


def teacher_dtype(config: Config, training: torch.dtype) -> torch.dtype:
    """distill.dtype."""
    return training if config.distill.dtype == "train" else getattr(torch, config.distill.dtype)


def teacher_memory(config: Config, teacher: ModelConfig, world_size: int) -> TeacherMemory:
    """What the teacher of a run takes when the student is as deep as it starts.

    Args:
        config: of the run; distill.kind is not none.
        teacher: architecture of the teacher.
        world_size: ranks.
    """
    plan, distill = plan_of(config, world_size), config.distill
    item = teacher_dtype(config, plan.dtype).itemsize
    stem, *blocks, head = layer_parameters(replace(teacher, weights=""))
    shares = world_size if distill.placement == "sharded" else 1
    parts = [-(-block // shares) for block in blocks]
    weights = stem + head + sum(parts) + (max(parts) * shares if shares > 1 else 0)
    tokens = (teacher.input_size // teacher.patch_size) ** 2
    stream, kept = tokens * teacher.hidden_size, max(plan.cut) if distill.kind == "features" else 0
    of_step = plan.accumulation * plan.micro_batch * ((1 + kept) * stream + teacher.hidden_size)
    at_work = plan.micro_batch * 2 * tokens * (teacher.hidden_size + teacher.mlp_size)
    return TeacherMemory(item * weights, item * (of_step + at_work))
