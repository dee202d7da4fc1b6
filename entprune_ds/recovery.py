"""Recovery training: the plain loss, or that of a teacher (masked representation distillation, TinyFusion, 2412.01199).

total = plain_weight * plain + output_weight * output + beta * features, with beta falling linearly to 0. Plain and
output are losses of the prediction, and so known where the last block lies. The features are those of every block:
their gradient is added where the backward pass comes by, on whatever rank, so that no loss has to be collected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, DistillConfig
from entprune_ds.diffusion.objective import Draws, Objective
from entprune_ds.engine.build import Engine
from entprune_ds.engine.train_step import train_step
from entprune_ds.logs import get_logger
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.teacher import Teacher, first_step, matching, open_teacher, teacher_path

FEATURE_WEIGHTS = {"dit": 1e-2, "sit": 2e-4}


class Recovery(Protocol):
    """How the loop trains."""

    digest: str | None
    """Of the teacher, for the checkpoint; None without one."""

    def train_step(
        self, engine: Engine, draws: list[Draws], objective: Objective, step: int, decisions: Sequence[PruneDecision]
    ) -> Tensor:
        """One optimizer step over the micro-batches of this data-parallel rank. Collective.

        Args:
            engine: what trains.
            draws: micro-batches, see Engine.reads_data.
            objective: of the training.
            step: optimizer steps done before.
            decisions: pruning decisions so far.

        Returns:
            Mean loss of this data-parallel rank, not synchronised; without that of the features.
        """

    def metrics(self, engine: Engine) -> dict[str, float]:
        """train/ values of the newest step, beside the loss. Collective."""


class PlainRecovery:
    """The training loss and nothing else."""

    digest: str | None = None

    def train_step(
        self, engine: Engine, draws: list[Draws], objective: Objective, step: int, decisions: Sequence[PruneDecision]
    ) -> Tensor:
        """See Recovery."""
        return train_step(engine, draws, objective.loss)[0]

    def metrics(self, engine: Engine) -> dict[str, float]:
        """None: the loss says it all."""
        return {}


class Distillation:
    """Training with a teacher, from distill.start or the first removal to the end of the run."""

    def __init__(self, config: Config, teacher: Teacher, digest: str | None = None):
        self.config, self.teacher, self.digest = config, teacher, digest
        self.terms: Terms | None = None

    def train_step(
        self, engine: Engine, draws: list[Draws], objective: Objective, step: int, decisions: Sequence[PruneDecision]
    ) -> Tensor:
        """See Recovery."""
        removals = [d.step for d in decisions if d.removes and not d.score_only]
        since = first_step(self.config, self.teacher.config, removals)
        if since is None or step < since:
            self.terms = None
            return train_step(engine, draws, objective.loss)[0]
        distill, model = self.config.distill, engine.backbone
        matched: dict[int, int] = {}
        if distill.kind == "features":  # made anew for the blocks of this step that lie here
            all_matched = matching(engine.kept_blocks, self.teacher.config.blocks)
            matched = {block: all_matched[block] for block in map(int, model.blocks)}
        last_stage = engine.cut is None or engine.pipe_stage == len(engine.cut) - 1
        with engine.parts.part("teacher"):
            lessons = self.teacher.outputs(draws, matched, last_stage)
        count = engine.ds.gradient_accumulation_steps()
        self.terms = Terms(distill, objective, count, engine.depth, feature_weight(self.config, step, since))
        if matched:
            model.tap = FeatureTap(self.terms, [lesson.features for lesson in lessons])
        taught = [replace(d, teacher=lesson.prediction) for d, lesson in zip(draws, lessons, strict=True)]
        del lessons
        try:
            return train_step(engine, taught, self.terms.loss)[0]
        finally:
            model.tap = None

    def metrics(self, engine: Engine) -> dict[str, float]:
        """See Recovery; train/loss is the total, train/loss_* its terms before their weights. Collective."""
        if self.terms is None:
            return {}
        distill, terms = self.config.distill, self.terms
        plain, output, features = (comm.all_reduce_sum(terms.sums.clone()) / engine.dp_size).tolist()
        total = distill.plain_weight * plain + distill.output_weight * output + terms.beta * features
        values = {"train/loss": total, "train/loss_plain": plain, "train/loss_output": output}
        if distill.kind == "features":
            values |= {"train/loss_features": features, "train/feature_weight": terms.beta}
        return values


def feature_weight(config: Config, step: int, since: int) -> float:
    """beta at a step: distill.feature_weight at the first one with the teacher, 0 after the last of the run."""
    first, end = config.distill.feature_weight, config.train.num_steps
    first = FEATURE_WEIGHTS[config.model.process] if first is None else first
    return first * (end - step) / (end - since)


class Terms:
    """The loss of one step, and the means of its terms as far as this rank sees them.

    Args:
        distill: settings.
        objective: of the training.
        count: micro-batches of the step.
        depth: blocks of the student, on whatever rank they lie.
        beta: weight of the features at this step.
    """

    def __init__(self, distill: DistillConfig, objective: Objective, count: int, depth: int, beta: float):
        self.distill, self.objective, self.count, self.depth, self.beta = distill, objective, count, depth, beta
        self.sums = torch.zeros(3, device=comm.device())

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor, teacher: Tensor) -> Tensor:
        """(N,): weighted sum of the training loss and of the distance from the teacher's prediction."""
        plain = self.objective.loss(prediction, target, t)
        output = self.objective.output_loss(prediction, teacher, t)
        self.sums[0] += plain.detach().mean() / self.count
        self.sums[1] += output.detach().mean() / self.count
        return self.distill.plain_weight * plain + self.distill.output_weight * output


class FeatureTap:
    """models.dit.Tap that pulls the output of every block towards the teacher's, micro-batch by micro-batch.

    Args:
        terms: takes the loss.
        features: of every micro-batch in the order of the forward passes, by block of the student; each is let go once
            its backward pass is through.
    """

    def __init__(self, terms: Terms, features: list[dict[int, Tensor]]):
        self.terms, self.features = terms, features
        self.passes: Counter[int] = Counter()

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Output of a block (N,T,D) -> the same, with the gradient of its feature loss added in the backward pass."""
        wanted = self.features[self.passes[index]].pop(index)
        self.passes[index] += 1
        return AddFeatureGradient.apply(x, wanted, self.terms)


class AddFeatureGradient(torch.autograd.Function):
    """Identity of x (N,T,D) whose backward pass adds the gradient of beta * feature loss, and notes that loss.

    The gradient is scaled by the number of micro-batches, as DeepSpeed scales that of the loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, teacher: Tensor, terms: Terms) -> Tensor:
        ctx.save_for_backward(x, teacher)  # x is saved by the next block already
        ctx.terms = terms
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Gradient (N,T,D) of what follows -> the same with ours."""
        (x, teacher), terms = ctx.saved_tensors, ctx.terms
        difference = masked_difference(x, teacher, terms.distill.feature_sigma)
        terms.sums[2] += difference.square().mean() / (terms.count * terms.depth)
        scale = 2 * terms.beta / (difference.numel() * terms.count * terms.depth)
        return gradient + (scale * difference).to(gradient.dtype), None, None


def masked_difference(student: Tensor, teacher: Tensor, sigma: float) -> Tensor:
    """student - teacher (N,T,D) f32 or f64, 0 where either lies too far out; mean and spread are those of an example.

    Residual streams hold a few huge elements, which would drown the others (TinyFusion, sec. 3.4).
    """
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    return (student - teacher) * (within(student, sigma) & within(teacher, sigma))


def within(x: Tensor, sigma: float) -> Tensor:
    """Elements of x (N,T,D) that lie within `sigma` standard deviations of the mean of their example."""
    variance, mean = torch.var_mean(x, dim=(1, 2), keepdim=True)
    return (x - mean).abs() < sigma * variance.sqrt()


def open_recovery(config: Config, engine: Engine, record: Mapping[str, Any]) -> Recovery:
    """What distill.* asks for. Collective.

    Args:
        config: of the run.
        engine: what will train.
        record: of the checkpoint that it goes on from, or empty.

    Raises:
        DistributedError: on all ranks, when the teacher cannot be read, or is not the one of the checkpoint.
    """
    if config.distill.kind == "none":
        return PlainRecovery()
    teacher, digest = open_teacher(config, engine.dtype)
    before = record.get("teacher")
    if before not in (None, digest):
        message = f"`distill.teacher`: {teacher_path(config)} has the digest {digest[:12]}, but this run has learned "
        message += f"from one with {str(before)[:12]}. Give the teacher that it was started with."
        raise comm.DistributedError(message)
    text = "teacher: %s, depth %d, %s, %s; %.1f MiB of weights on this rank"
    where, precision = config.distill.placement, str(teacher.dtype).removeprefix("torch.")
    get_logger().info(text, teacher_path(config), len(teacher.config.blocks), precision, where, teacher.nbytes / 2**20)
    return Distillation(config, teacher, digest)
