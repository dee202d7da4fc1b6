"""Learned gates: which blocks to keep is trained together with LoRA, which stands for the recovery to come.

TinyFusion (Fang et al., arXiv 2412.01199): every group of consecutive blocks draws one of its masks by a
straight-through Gumbel-softmax, y = x + m (f(x) - x), and the loss of the masked, LoRA-tuned model trains logits and
LoRA alike. Temperature, scale, rank and learning rates are those of the authors.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from entprune_ds import comm, fault_points
from entprune_ds.importance.finite import raise_not_finite
from entprune_ds.importance.gates import Gates, split_into_groups
from entprune_ds.importance.lora import Adapters, adapted, new_adapters
from entprune_ds.importance.measuring import Batch, Measuring, my_share
from entprune_ds.importance.parts import embed
from entprune_ds.importance.scores import Score, Scores
from entprune_ds.importance.walk import require_graph
from entprune_ds.logs import get_logger
from entprune_ds.rng import generator_for

PROGRESS_SECONDS = 10.0
"""Learning that takes longer says how far it is."""


def measure_learned(m: Measuring) -> Scores:
    """Train gates and LoRA for learned.steps steps on fresh draws. Collective: all ranks call.

    Logits and LoRA are small and held by every rank; the blocks stay as they are and are asked for one at a time.

    Returns:
        learned: the probability of each block to be kept; learned_mask: 1 for the blocks of the most probable mask of
        each group, of which there are as many as the target depth, else 0. They have no standard error: it is stated
        as 0.

    Raises:
        DistributedError: on all ranks, when a loss or a gradient is not finite, naming the block and the step.
        ValueError: when the model gives no gradients.
    """
    settings, seed = m.config.learned, m.config.run.seed
    groups = split_into_groups(m.kept_blocks, m.config.prune.target_depth or 1, settings.group_size)
    gates, adapters = Gates(groups, settings.scale), {}
    for b in m.kept_blocks:
        adapters[b] = new_adapters(m.parts.block(b), settings.lora_rank, seed, f"learned/lora/{b}", m.check)
    factors = [factor for of_block in adapters.values() for adapter in of_block.values() for factor in adapter]
    optimizers = [torch.optim.Adam(gates.logits, lr=settings.learning_rate)]
    if factors:
        optimizers.append(torch.optim.Adam(factors, lr=settings.lora_learning_rate))
    start = shown = time.perf_counter()
    for step in range(settings.steps):
        tau = settings.tau[0] + (settings.tau[1] - settings.tau[0]) * step / max(1, settings.steps - 1)
        keep = gates.sample(tau, generator_for(seed, "learned/gumbel", m.check, step))
        loss, gradient = gated_gradients(m, m.draw("learned", settings.batch_size), keep.tolist(), adapters, step)
        keep.backward(gradient)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        fault_points.reach("scoring")
        if time.perf_counter() - shown >= PROGRESS_SECONDS:
            shown = time.perf_counter()
            left = (shown - start) / (step + 1) * (settings.steps - step - 1)
            get_logger().info("gates: step %d of %d, loss %.4f, %.0f s left", step + 1, settings.steps, loss, left)
    best = gates.best()
    return {
        "learned": {b: Score(p, 0.0) for b, p in gates.probabilities().items()},
        "learned_mask": {b: Score(float(best[b]), 0.0) for b in m.kept_blocks},
    }


def gated_gradients(
    m: Measuring, batch: Batch, keep: list[float], adapters: dict[int, Adapters], step: int
) -> tuple[float, Tensor]:
    """Mean loss of the masked model on a batch and its gradient by the gates; that by LoRA goes to `.grad`. Collective.

    A forward pass keeps the block inputs, a backward pass computes each block again. A block whose gate is 0 is skipped
    forwards; backwards its gate still gets its gradient <dL/dy, f(x) - x>, and its LoRA none.

    Args:
        m: the check.
        batch: equal on all ranks, each of which takes its share.
        keep: 0 or 1 for each of m.kept_blocks.
        adapters: LoRA by block.
        step: for errors.

    Returns:
        The loss, and the gradient (L,) float64 on the CPU, both over all ranks.
    """
    mine, inputs = my_share(batch), []
    with torch.no_grad():
        x, c = embed(m.parts, mine.z_t, mine.t, mine.labels)
        for index, gate in zip(m.kept_blocks, keep, strict=True):
            inputs.append(x)
            if gate:
                with adapted(m.parts.block(index), adapters[index]) as block:
                    x = block(x, c)
    loss, gradient = _loss_and_gradient(m, mine, x, c, len(batch.labels))
    sums = torch.zeros(1 + len(keep), dtype=torch.float64, device=x.device)
    sums[0] = loss
    if not torch.isfinite(comm.all_reduce_sum(sums[:1].clone())):
        raise_not_finite(m, mine, lambda draw: f"step {step} of the learned gates")
    for place in reversed(range(len(keep))):
        index, x = m.kept_blocks[place], inputs.pop()
        with adapted(m.parts.block(index), adapters[index]) as block:
            if keep[place]:
                y, gradient_by_x = _through(block, index, x, c, gradient, adapters[index])
            else:
                with torch.no_grad():
                    y, gradient_by_x = block(x, c), gradient
        sums[1 + place] = (gradient.double() * (y.detach() - x).double()).sum()
        gradient = gradient_by_x
    total = comm.all_reduce_sum(sums).cpu()
    if not torch.isfinite(total).all():
        bad = [m.kept_blocks[i] for i in (~torch.isfinite(total[1:])).nonzero().flatten().tolist()]
        text = f"check {m.check}: the gradient by the gates of blocks {bad} is NaN or infinite in step {step} of the "
        raise comm.DistributedError(
            f"{text}learned gates. Nothing was removed."
        )  # the same on all ranks: it is reduced
    return total[0].item(), total[1:]


def _loss_and_gradient(m: Measuring, mine: Batch, x: Tensor, c: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean loss over `count` draws, and its gradient by the head's input x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        prediction = m.parts.head(leaf, c).double()
        require_graph(prediction, "the head")
        loss = m.loss_fn(prediction, mine.target.to(prediction), mine.t).sum() / count
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _through(block, index: int, x: Tensor, c: Tensor, gradient: Tensor, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """Output of a block and the gradient by its input; the gradient by its LoRA, over all ranks, goes to `.grad`."""
    factors = [factor for adapter in adapters.values() for factor in adapter]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = block(x, c)
        require_graph(y, f"block {index}")
        by_x, *by_factors = torch.autograd.grad(y, [x, *factors], gradient)
    if factors:
        joined = comm.all_reduce_sum(torch.cat([g.flatten() for g in by_factors]))
        for factor, part in zip(factors, joined.split([f.numel() for f in factors]), strict=True):
            factor.grad = part.view_as(factor)
    return y, by_x
