"""The border to a user's own criterion: what its code raises or returns becomes one error that names the file."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from entprune_ds import comm
from entprune_ds.importance.criteria import Criterion, RankingRequest
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Score, Scores


def guarded(path: Path, criterion: Criterion) -> Criterion:
    """A criterion whose errors name its file.

    Its measure raises RankError, for who knows where the other ranks are; its order, which meets nobody, ValueError.
    """
    measure_own = criterion.measure

    def measure(m: Measuring) -> Scores:
        assert measure_own is not None
        try:
            found = measure_own(m)
        except (comm.RankError, comm.DistributedError):
            raise
        except Exception as error:
            raise comm.RankError(f"check {m.check}: {_failed(path, 'measure', error)}") from error
        try:
            return checked_scores(found, m.kept_blocks)
        except ValueError as problem:
            raise comm.RankError(f"check {m.check}: `prune.criterion` {path}: {problem}") from problem

    def order(request: RankingRequest) -> list[int]:
        try:
            return list(criterion.order(request))
        except Exception as error:
            raise ValueError(f"check {request.check}: {_failed(path, 'order', error)}") from error

    return replace(criterion, order=order, measure=None if measure_own is None else measure)


def checked_scores(found: Any, kept_blocks: tuple[int, ...]) -> Scores:
    """What a measure has returned, with plain numbers.

    Raises:
        ValueError: when it is not {name: {block: Score}} over the present blocks.
    """
    form = f"its measure must return {{name: {{block: Score(value, standard_error)}}}} for blocks {list(kept_blocks)}"
    remedy = "Correct it (docs/CRITERIA.md has an example). Nothing was removed."
    if not isinstance(found, Mapping):
        raise ValueError(f"{form}, but returned {type(found).__name__}. {remedy}")
    scores: Scores = {}
    for name, by_block in found.items():
        if not isinstance(name, str) or not isinstance(by_block, Mapping):
            raise ValueError(f"{form}, but returned {{{name!r}: {type(by_block).__name__}}}. {remedy}")
        if sorted(by_block, key=str) != sorted(kept_blocks, key=str):
            raise ValueError(f"{form}, but {name} is of blocks {list(by_block)}. {remedy}")
        wrong = next((type(s).__name__ for s in by_block.values() if not isinstance(s, Score)), None)
        if wrong:
            raise ValueError(f"{form}, but {name} holds {wrong}. {remedy}")
        try:
            plain = {b: (float(s.value), float(s.standard_error)) for b, s in by_block.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{form}, but {name} holds a score that is no number ({error}). {remedy}") from error
        scores[name] = {int(b): Score(*plain[b]) for b in by_block}
    return scores


def _failed(path: Path, part: str, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    if "Nothing was removed" in str(error):  # one of our own functions has said all
        return f"`prune.criterion` {path}{where}: {error}"
    why = f"{type(error).__name__}: {error}"
    return f"`prune.criterion` {path}{where}: its {part} fails ({why}). Correct it. Nothing was removed."
