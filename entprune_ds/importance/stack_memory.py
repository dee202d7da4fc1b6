"""The memory of a sweep: of one block evaluation, of the stack of variants, and of streams kept for a later sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig

WIDEST_ACTIVATION = {"cpu": 2**23, "cuda": 2**30}
"""Bytes of the widest activation (MLP) in one block evaluation of the sweep: bounds its memory, fits CPU caches."""


def units_of(config: Config) -> tuple[str, ...]:
    """Units that a sweep leaves out: whole blocks always, and the branch of score.unit."""
    return ("block",) if config.score.unit == "block" else ("block", config.score.unit)


def stack_chunk(model: ModelConfig, dtype: torch.dtype) -> int:
    """Examples (variants x draws) that one block evaluation takes at once within WIDEST_ACTIVATION."""
    tokens = (model.input_size // model.patch_size) ** 2
    widest = tokens * model.mlp_size * dtype.itemsize
    return max(1, WIDEST_ACTIVATION[comm.device().type] // widest)


def stream_bytes(config: Config, world_size: int) -> int:
    """Bytes of one variant on the rank with the most draws of a batch."""
    model, score = config.model, config.score
    tokens = (model.input_size // model.patch_size) ** 2
    itemsize: int = getattr(torch, score.dtype).itemsize
    return -(-score.batch_size // world_size) * tokens * model.hidden_size * itemsize


def stack_rows(config: Config, depth: int) -> int:
    """Variants in the stack at the end of a sweep of `depth` blocks, the clean stream among them."""
    return 1 + depth * len(units_of(config))


def stack_problem(config: Config, world_size: int, depth: int) -> str | None:
    """The sentence for the user when the stack of a sweep does not fit `score.stack_memory`, else None.

    It is refused and not split, because every part of a split batch would gather all blocks once more: a smaller
    batch does the same, on the same draws.
    """
    rows, limit = stack_rows(config, depth), config.score.stack_memory * 2**20
    needed = rows * stream_bytes(config, world_size)
    if needed <= limit:
        return None
    of_draw = needed // -(-config.score.batch_size // world_size)
    draws, batch = config.score.draws, limit // of_draw * world_size
    fitting = max((b for b in range(1, min(batch, draws // 2) + 1) if draws % b == 0 and b >= world_size), default=0)
    remedy = f"Set `score.batch_size` to {fitting}, or raise" if fitting else "Raise"
    what = f"{rows} variants of {config.score.batch_size} draws on {world_size} ranks take {-(-needed // 2**20)} MiB"
    return f"`score.stack_memory` is {config.score.stack_memory} MiB, but {what} a rank. {remedy} `score.stack_memory`."


@dataclass(frozen=True)
class _Kept:
    passed: tuple[int, ...]
    """Blocks that the streams went through."""
    stack: Tensor
    changes: Tensor


class KeptStreams:
    """Streams of the earlier rounds of a greedy ranking, within the memory that the stack leaves.

    A round differs from the one before from the removed block on, so a sweep starts from the deepest streams that
    went through blocks which are all still there. Kept are those before every `stride`-th block, the smallest stride
    that fits. Counted in rows of the largest share of a batch, so that all ranks keep and take the same.
    """

    def __init__(self, config: Config, world_size: int, depth: int):
        free = config.score.stack_memory * 2**20 - stack_rows(config, depth) * stream_bytes(config, world_size)
        groups = max(1, config.score.draws // config.score.batch_size)
        self.free_rows, self.rows = max(0, free // max(1, stream_bytes(config, world_size))), 0
        rows = {s: groups * sum(stack_rows(config, p) for p in range(s, depth, s)) for s in range(1, depth + 1)}
        self.stride = min(s for s in rows if rows[s] <= self.free_rows)  # at `depth` there is nothing to keep
        self._kept: dict[int, list[_Kept]] = {}

    def of(self, group: int) -> _OfGroup:
        """The streams of one calibration batch, as a sweep uses them."""
        return _OfGroup(self, self._kept.setdefault(group, []))


class _OfGroup:
    """See sweep.Streams."""

    def __init__(self, all_groups: KeptStreams, kept: list[_Kept]):
        self._all, self._kept = all_groups, kept

    def take(self, kept_blocks: Sequence[int]) -> tuple[int, Tensor, Tensor] | None:
        """The deepest streams that fit these blocks; what does not fit any more is let go."""
        stays = [k for k in self._kept if k.passed == tuple(kept_blocks[: len(k.passed)])]
        self._all.rows -= sum(len(k.stack) for k in self._kept) - sum(len(k.stack) for k in stays)
        self._kept[:] = stays
        if not stays:
            return None
        deepest = max(stays, key=lambda k: len(k.passed))
        return len(deepest.passed), deepest.stack, deepest.changes

    def offer(self, passed: Sequence[int], stack: Tensor, changes: Tensor) -> None:
        """Copy the streams where this is a place to keep them, and they are not there yet."""
        wanted = len(passed) > 0 and len(passed) % self._all.stride == 0
        known = any(k.passed == tuple(passed) for k in self._kept)
        if wanted and not known and self._all.rows + len(stack) <= self._all.free_rows:
            self._all.rows += len(stack)
            self._kept.append(_Kept(tuple(passed), stack.clone(), changes.clone()))
