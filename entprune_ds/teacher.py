"""The teacher: the unpruned model, frozen; a share of every block on every rank, gathered one block at a time.

It is no engine and holds no gradients. Its forward pass stands before the student's, so that its collectives meet no
hook of DeepSpeed and none of a pipeline.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig, digest
from entprune_ds.diffusion.objective import Draws, build_objective
from entprune_ds.estimate_teacher import teacher_dtype
from entprune_ds.interop.finite import non_finite, non_finite_problem
from entprune_ds.interop.source import Source, architecture
from entprune_ds.interop.weights import diffusion_problems, open_weights
from entprune_ds.models.dit import DiT, build_block
from entprune_ds.models.layers import position_embedding

SAME = (
    "process", "depth", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "input_size", "in_channels",
    "num_classes", "learn_sigma",
)  # fmt: skip
"""What teacher and student must have in common; their blocks and the widths of these may differ."""


def teacher_path(config: Config) -> Path:
    """distill.teacher, or model.weights."""
    return Path(config.distill.teacher or config.model.weights)


def teacher_problems(config: Config) -> list[str]:
    """Why this run cannot learn from its teacher, every difference with both values; empty when it can. Local."""
    distill, path = config.distill, teacher_path(config)
    if distill.kind == "none":
        return []
    if not (distill.teacher or config.model.weights):
        message = f"`distill.kind` is {distill.kind}, but there is no teacher: `distill.teacher` and `model.weights` "
        return [message + "are empty. Give the unpruned model as one of them."]
    try:
        source = open_weights(path, assumed=config.model)
    except (OSError, ValueError) as error:
        return [f"`distill.teacher`: {error}"]
    if not distill.teacher and source.facts["weights"] != "ema":
        message = f"`distill.teacher` is empty, and model.weights ({path}) is not known to hold EMA weights "
        message += f"({source.facts['weights']}). Export the run with weights=ema; released weights are EMA weights "
        return [f"{message}already: name them, distill.teacher={path}"]
    if "label_table" in source.facts:
        message = f"`distill.teacher` ({path}) has a label table that is {source.facts['label_table']}, and has not "
        return [message + "learned these classes. Train it on them first, without pruning, and take that model."]
    found = _differences(config.model, source.model, path) or diffusion_problems(config.diffusion, source, path)
    prune = config.prune
    removes = bool(config.soft.every) or (prune.target_depth is not None and not prune.score_only)
    if not found and not removes and first_step(config, source.model, ()) is None:
        message = "`distill.start` is null, which is the first removal, but nothing is removed. "
        found.append(message + "Set distill.start=0, or distill.kind=none.")
    return found


def _differences(student: ModelConfig, teacher: ModelConfig, path: Path) -> list[str]:
    wrong = [key for key in SAME if getattr(student, key) != getattr(teacher, key)]
    if wrong:
        values = ", ".join(f"`model.{k}` {getattr(student, k)} against {getattr(teacher, k)}" for k in wrong)
        message = f"`distill.teacher` ({path}) has another architecture than the student: {values}. "
        remedy = "Take the model that the student is made from."
        if wrong == ["num_classes"]:
            remedy = "Train it on the new classes first, without pruning, and take that model for both."
        return [message + remedy]
    missing = sorted(set(student.blocks) - set(teacher.blocks))
    if missing:
        message = f"`distill.teacher` ({path}) has no blocks {missing}, which the student has. "
        return [message + "Take the unpruned model."]
    return []


def first_step(config: Config, teacher: ModelConfig, removals: Sequence[int]) -> int | None:
    """First step that learns from the teacher, None when there is none yet.

    Args:
        config: of the run.
        teacher: architecture of the teacher.
        removals: steps of the removals so far, in their order.
    """
    if config.distill.start is not None:
        return config.distill.start
    student = config.model
    smaller = any(student.widths(block) != teacher.widths(block) for block in student.blocks)
    if smaller or student.blocks != teacher.blocks:
        return 0
    return removals[0] if removals else None


def matching(student: Sequence[int], teacher: Sequence[int]) -> dict[int, int]:
    """{block of the student: the last block of the teacher that it stands for}, by original index.

    A block stands for itself and for the removed ones after it, up to the next one that was kept.
    """
    after = [*student[1:], math.inf]
    return {block: max(b for b in teacher if b < limit) for block, limit in zip(student, after, strict=True)}


@dataclass
class Lesson:
    """What the teacher says about one micro-batch."""

    prediction: Tensor | None = None
    """(N,C,H,W), its whole prediction."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """{block of the student: output (N,T,D) of the block of the teacher that it is matched with}."""


class Teacher:
    """A frozen model as every rank sees it.

    Args:
        source: the model at rest; only this rank's share of its blocks is converted and kept.
        dtype: precision of weights and activations.
        sharded: whether the blocks are spread over the ranks; otherwise they are whole on every one.
    """

    def __init__(self, source: Source, dtype: torch.dtype, sharded: bool):
        self.config, self.dtype, self.device = source.model, dtype, comm.device()
        shares, mine = (comm.world_size(), comm.rank()) if sharded else (1, 0)
        self.sharded = shares > 1
        with torch.device("meta"):
            self.stem = DiT(self.config.keeping(()))
        self.stem.to_empty(device=self.device).to(dtype).requires_grad_(False).eval()
        self.stem.pos_embed = position_embedding(self.config.hidden_size, self.stem.side).to(self.device)
        for name, parameter in self.stem.named_parameters():
            parameter.copy_(source.read(name))
        self.spares = {self.config.widths(b): _spare(self.config, b) for b in self.config.blocks}
        self.shares = {b: self._share(source, b, shares, mine) for b in self.config.blocks}
        largest = max(share.numel() for share in self.shares.values())
        self.gathered = torch.empty(largest * shares if self.sharded else 0, dtype=dtype, device=self.device)

    def _share(self, source: Source, block: int, shares: int, mine: int) -> Tensor:
        """This rank's elements of a block, whose parameters lie one after the other."""
        shapes = {n: p.shape for n, p in self.spares[self.config.widths(block)].named_parameters()}
        size = -(-sum(shape.numel() for shape in shapes.values()) // shares)
        share = torch.zeros(size, dtype=self.dtype, device=self.device)
        first, start = size * mine, 0
        for name, shape in shapes.items():
            low, high = max(first, start), min(first + size, start + shape.numel())
            if low < high:
                part = source.read(f"blocks.{block}.{name}").reshape(-1)[low - start : high - start]
                share[low - first : high - first] = part
            start += shape.numel()
        return share

    @property
    def nbytes(self) -> int:
        """Bytes of weights that this rank holds, the gathered block included."""
        held = [*self.stem.parameters(), *self.shares.values(), self.gathered]
        return sum(tensor.nbytes for tensor in held)

    def block(self, index: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Block `index` (original), valid until the next call. Collective where the teacher is sharded."""
        flat = self.shares[index]
        if self.sharded:
            flat = comm.all_gather_into(self.gathered[: flat.numel() * comm.world_size()], flat)
        spare, weights, start = self.spares[self.config.widths(index)], {}, 0
        for name, parameter in spare.named_parameters():
            size = parameter.shape.numel()
            weights[name] = flat[start : start + size].view(parameter.shape)
            start += size
        return lambda x, c: functional_call(spare, weights, (x, c))  # (N,T,D), (N,D) -> (N,T,D)

    @torch.no_grad()
    def outputs(self, draws: Sequence[Draws], matched: Mapping[int, int], prediction: bool) -> list[Lesson]:
        """What this rank needs for each of its micro-batches. Collective: all ranks call, with whatever they need.

        All micro-batches go through a block while it is gathered, so that each is gathered once, and their number may
        differ between ranks.

        Args:
            draws: micro-batches; only z_t, t and labels are used.
            matched: {block of the student: block of the teacher} whose outputs are wanted.
            prediction: whether the prediction is.
        """
        lessons = [Lesson() for _ in draws]
        student = {teacher: block for block, teacher in matched.items()}
        last = math.inf if prediction else max(student, default=-1)
        streams = []
        if last >= 0:
            moved = [d.to(self.device, self.dtype) for d in draws]
            streams = [self.stem.embed(d.z_t, d.t, d.labels) for d in moved]  # x (N,T,D), c (N,D)
        for index in self.config.blocks:
            if index > last and not self.sharded:
                break
            block = self.block(index)
            if index > last:
                continue  # the others still need this rank's share
            streams = [(block(x, c), c) for x, c in streams]
            if index in student:
                for lesson, (x, _) in zip(lessons, streams, strict=True):
                    lesson.features[student[index]] = x
        if prediction:
            for lesson, (x, c) in zip(lessons, streams, strict=True):
                lesson.prediction = self.stem.head(x, c)
        return lessons


def _spare(config: ModelConfig, block: int) -> nn.Module:
    """A block without weights, to be called with those of any block as wide."""
    with torch.device("meta"):
        return build_block(config, block).requires_grad_(False).eval()


def open_teacher(config: Config, training_dtype: torch.dtype) -> tuple[Teacher, str]:
    """The teacher of a run and the digest of its architecture and weights. Collective.

    Raises:
        DistributedError: on all ranks, when one cannot read it, or it holds NaN or infinite values, or gives them.
    """
    path, error, counts = teacher_path(config), None, []
    try:
        source = open_weights(path, assumed=config.model)
        for name in list(source.shapes)[comm.rank() :: comm.world_size()]:
            tensor = source.read(name).contiguous()
            text = hashlib.sha256(tensor.view(-1).numpy().data).hexdigest()
            counts.append([name, text, non_finite(tensor)])
    except (OSError, ValueError) as problem:
        error = f"`distill.teacher`: {problem}"
    comm.raise_together(error)
    read = {name: (text, count) for part in comm.all_gather_json(counts) for name, text, count in part}
    comm.raise_together(non_finite_problem(f"`distill.teacher` ({path})", {n: read[n][1] for n in source.shapes}))
    known = digest([architecture(source.model), {name: text for name, (text, _) in read.items()}])
    comm.assert_same_on_all_ranks(known, "the teacher (`distill.teacher`)")
    dtype = teacher_dtype(config, training_dtype)
    teacher = Teacher(source, dtype, config.distill.placement == "sharded")
    _try_out(teacher, config, path)
    return teacher, known


def _try_out(teacher: Teacher, config: Config, path: Path) -> None:
    """One lesson before anything is removed: finite weights can overflow. Collective.

    Raises:
        DistributedError: on all ranks, when the output is not finite.
    """
    model = teacher.config
    zeros = torch.zeros(2, model.in_channels, model.input_size, model.input_size)
    labels = torch.zeros(2, dtype=torch.int64)
    objective = build_objective(model, config.diffusion)
    draws = objective.make_draws(zeros, labels, range(2), seed=config.run.seed, purpose="teacher", step=0)
    [lesson] = teacher.outputs([draws], {}, True)
    assert lesson.prediction is not None
    error = None
    if not lesson.prediction.isfinite().all():
        error = f"`distill.teacher` ({path}) gives NaN or infinite output in {teacher.dtype}, though its weights are "
        error += "finite. Give another teacher, or leave distillation out (distill.kind=none)."
    comm.raise_together(error)
