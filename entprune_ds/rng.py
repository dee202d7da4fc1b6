"""Randomness as a pure function of (seed, purpose, step, slot): there is no state to save.

Every random tensor of a run comes from a generator made here, so a resume, another number of ranks
or another micro-batch size draws the same numbers, and scoring cannot disturb training.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, purpose: str, step: int = 0, slot: int = 0) -> torch.Generator:
    """CPU generator for one use.

    Args:
        seed: seed of the run.
        purpose: what the numbers are for, e.g. "noise"; different purposes are independent.
        step: optimizer step, repeat or check.
        slot: position of the example in the global batch (or any other index).
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed(_seed_for(seed, purpose, step, slot))
    return generator


def coin(seed: int, purpose: str, step: int = 0, slot: int = 0) -> bool:
    """A random bit; names a use as generator_for does, and is independent of that generator.

    It is the highest bit of the generator's seed: torch makes its numbers from the low 32 bits.
    """
    return bool(_seed_for(seed, purpose, step, slot) >> 62)


def _seed_for(seed: int, purpose: str, step: int, slot: int) -> int:
    """63 bits of a hash."""
    key = hashlib.sha256(f"{seed}/{purpose}/{step}/{slot}".encode()).digest()
    return int.from_bytes(key[:8], "little", signed=False) >> 1


def normal_per_slot(seed: int, purpose: str, step: int, slots: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (len(slots), *shape) f32, one independent stream per slot."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, purpose, step, s)) for s in slots])


def uniform_per_slot(seed: int, purpose: str, step: int, slots: list[int]) -> Tensor:
    """Uniform numbers (len(slots),) f32 in [0, 1), one independent stream per slot."""
    return torch.cat([torch.rand(1, generator=generator_for(seed, purpose, step, s)) for s in slots])


def permutation(seed: int, purpose: str, step: int, slot: int, size: int) -> list[int]:
    """Random order of range(size)."""
    return torch.randperm(size, generator=generator_for(seed, purpose, step, slot)).tolist()
