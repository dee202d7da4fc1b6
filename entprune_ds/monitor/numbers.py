"""Numbers and block lists as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"


def number_or_nan(value: float | None) -> float:
    """A number of JSON, which writes null for one that is not finite."""
    return math.nan if value is None else float(value)


def sensible(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0123, 12.3, 12,345, 1.2e-07; a dash for NaN."""
    if not math.isfinite(value):
        return MISSING
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def with_error(value: float, standard_error: float) -> str:
    """Value and standard error, both cut where the error has two digits: 0.460 ± 0.021."""
    if not (math.isfinite(value) and math.isfinite(standard_error) and standard_error > 0):
        return sensible(value)
    decimals = 1 - math.floor(math.log10(standard_error))
    if not -6 <= decimals <= 8:
        return f"{value:.2e} ± {standard_error:.1e}"
    decimals = max(decimals, 0)
    return f"{value:,.{decimals}f} ± {standard_error:,.{decimals}f}"


def magnitude(value: float) -> str:
    """A large count: 1,234 / 65.4 k / 675 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{sensible(value / (1e3 if letter == 'k' else size))} {letter}"
    return sensible(value)


def percent(value: float) -> str:
    """A share in percent with one decimal."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else MISSING


def block_ranges(blocks: Iterable[int]) -> str:
    """Block indices with runs joined: 0–2, 5, 7."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}{'–' if len(r) > 2 else ', '}{r[-1]}" for r in runs)


def blocks_text(blocks: Iterable[int]) -> str:
    """Block indices in a sentence: no block, block 3, blocks 3 and 5, blocks 0–2, 5."""
    found = sorted(blocks)
    if not found:
        return "no block"
    return ("block " if len(found) == 1 else "blocks ") + (
        " and ".join(map(str, found)) if len(found) == 2 else block_ranges(found)
    )
