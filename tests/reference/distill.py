"""Distillation in one process, the gradient that of the summed loss: no shares, no hooks, no micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds.models.dit import DiT


def hidden_states(model: DiT, blocks: list[int], z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """({block: its output (N,T,D)}, prediction (N,C,H,W)) of these blocks alone."""
    x, c = model.embed(z_t, t, labels)
    states = {}
    for block in blocks:
        x = states[block] = model.blocks[str(block)](x, c)
    return states, model.head(x, c)


def matched_block(block: int, student: list[int], teacher: list[int]) -> int:
    """Walk on from a block of the student over all that follow in the teacher, until one that the student has too."""
    found = block
    for candidate in range(block + 1, max(teacher) + 1):
        if candidate in student:
            break
        found = candidate if candidate in teacher else found
    return found


def feature_loss(student: Tensor, teacher: Tensor, sigma: float) -> Tensor:
    """Of one image, (T,D) each: the mean over all elements, where those too far out in either count nothing."""
    inside = torch.ones_like(student)
    for x in (student, teacher):
        numbers = x.detach().flatten()
        mean = numbers.sum() / len(numbers)
        spread = (((numbers - mean) ** 2).sum() / (len(numbers) - 1)).sqrt()
        inside = inside * ((x - mean).abs() < sigma * spread)
    return (inside * (student - teacher) ** 2).sum() / student.numel()


def terms(
    student: DiT, kept: list[int], teacher: DiT, teacher_blocks: list[int], draws: tuple, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain, output and feature loss of a flow model; draws = (z_t, t, labels, target)."""
    z_t, t, labels, target = draws
    states, prediction = hidden_states(student, kept, z_t, t, labels)
    with torch.no_grad():
        wanted_states, wanted = hidden_states(teacher, teacher_blocks, z_t, t, labels)
    features = []
    for block in kept:
        other = wanted_states[matched_block(block, kept, teacher_blocks)]
        features += [feature_loss(states[block][n], other[n], sigma) for n in range(len(z_t))]
    plain, output = ((prediction - target) ** 2).mean(), ((prediction - wanted) ** 2).mean()
    return plain, output, torch.stack(features).mean()


def train(
    student: DiT, teacher: DiT, batches: list[tuple], kept_at: list[list[int]], betas: list[float | None], rate: float,
    clip: float,
) -> list[list[float]]:  # fmt: skip
    """Optimizer steps; per step its total and terms. A beta of None is a step without the teacher.

    Args:
        kept_at: the blocks of each step; what a block has learned stays with it, and a removed one is left alone.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    rows, all_blocks = [], [int(b) for b in teacher.blocks]
    for draws, kept, beta in zip(batches, kept_at, betas, strict=True):
        plain, output, features = terms(student, kept, teacher, all_blocks, draws, 2.0)
        total = plain if beta is None else 0.1 * plain + 0.9 * output + beta * features
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        used = [p for p in student.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(used, clip)
        optimizer.step()
        rows.append([x.item() for x in (total, plain, output, features)])
    return rows
