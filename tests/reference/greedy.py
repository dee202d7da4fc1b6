"""Greedy removal and scores of a block's own change by brute force: all computed again for every set of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.leave_one_out import brute_force_outputs, brute_force_scores


class Keeping(nn.Module):
    """A model with some of its blocks, as the brute force takes it."""

    def __init__(self, model: nn.Module, kept_blocks: Sequence[int]):
        super().__init__()
        self.embed, self.head = model.embed, model.head
        self.blocks = nn.ModuleDict({str(b): model.blocks[str(b)] for b in kept_blocks})


@torch.no_grad()
def own_changes(model: nn.Module, z_t: Tensor, t: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """{"flux_lite": (L,), "shortgpt": (L,)}: block input against block output."""
    x, c = model.embed(z_t, t, labels)
    squares, cosines = [], []
    for block in model.blocks.values():
        y = block(x, c)
        squares.append((x - y).square().mean())
        cosines.append((1 - F.cosine_similarity(x, y, dim=2)).mean())
        x = y
    return {"flux_lite": torch.stack(squares), "shortgpt": torch.stack(cosines)}


def greedy_order(
    model: nn.Module, criterion: str, draws: tuple[Tensor, Tensor, Tensor, Tensor], removals: int
) -> tuple[list[int], list[Tensor]]:
    """Blocks in the order of removal, and the scores of every round."""
    z_t, t, labels, target = draws
    halves = [list(range(len(t) // 2)), list(range(len(t) // 2, len(t)))]  # standard errors are not looked at
    kept, gone, rounds = [int(b) for b in model.blocks], [], []
    for _ in range(removals):
        now = Keeping(model, kept)
        found = brute_force_scores(brute_force_outputs(now, z_t, t, labels), target, halves)
        scores = {name: values for name, (values, _) in found.items()} | own_changes(now, z_t, t, labels)
        rounds.append(scores[criterion])
        order = sorted(range(len(kept)), key=lambda i, score=scores[criterion]: (score[i].item(), -kept[i]))
        gone.append(kept.pop(order[0]))
        rest = [kept[i - (i > order[0])] for i in order[1:]]
    return gone + rest, rounds
