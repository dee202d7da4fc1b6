"""NaN and infinite values in weights: counted one tensor at a time, and refused before anything is made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds.interop.source import Source

SHOWN = 5


def check_finite(source: Source, what: str) -> None:
    """Read every value of a model, one tensor at a time.

    Args:
        source: the model.
        what: its name, for the message.

    Raises:
        ValueError: with the first tensors that hold NaN or infinite values, and how many.
    """
    problem = non_finite_problem(what, {name: non_finite(source.read(name)) for name in source.shapes})
    if problem is not None:
        raise ValueError(problem)


def non_finite(tensor: Tensor) -> int:
    """Number of NaN and infinite values."""
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def non_finite_problem(what: str, counts: dict[str, int]) -> str | None:
    """The message for counts by tensor name; None when all are zero."""
    found = {name: count for name, count in counts.items() if count}
    if not found:
        return None
    some = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    message = f"{what} holds {sum(found.values())} NaN or infinite values, in {len(found)} tensors: {some}{more}. "
    return message + "Its training diverged, or the file is damaged: take an intact copy, or earlier weights."
