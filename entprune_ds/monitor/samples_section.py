"""Sample grids in the report: base and final side by side, then the way between them."""

from __future__ import annotations

import math
from pathlib import Path

from .html import Markup, figure, png_width, tag

MOST_SAMPLES = 12
"""Pictures of the way from base to final; more are thinned evenly."""
MOST_SAMPLE_BYTES = 4_000_000
"""Largest picture that is embedded."""


def samples_section(paths: list[Path], problems: list[str]) -> Markup | None:
    """HTML of the grids, in the given order; what cannot be shown is added to `problems`. None without pictures."""
    pictures = _read(paths, problems)
    before = [p for p in pictures if p[0].name.startswith("base_")]
    others = [p for p in pictures if not p[0].name.startswith("base_")]
    between, after = others[:-1], others[-1:]
    if not pictures:
        return None
    pair = [figure(data, f"Samples of the base model, {p.name}", f"Before: {p.name}") for p, data in before]
    pair += [figure(data, f"Last samples of this run, {p.name}", f"After: {p.name}") for p, data in after]
    parts = [tag("h2", "Samples"), tag("div", *pair, class_="pair")]
    if between:
        shown = between[:: math.ceil(len(between) / MOST_SAMPLES)]
        thinned = f"{len(shown)} of {len(between)} shown." if len(shown) < len(between) else None
        strip = [figure(data, f"Samples, {p.name}", p.name) for p, data in shown]
        parts += [tag("h3", "On the way"), tag("p", thinned, class_="soft"), tag("div", *strip, class_="strip")]
    return tag("section", *parts)


def _read(paths: list[Path], problems: list[str]) -> list[tuple[Path, bytes]]:
    pictures = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(f"samples/{path.name} cannot be read: {error.strerror}.")
            continue
        if png_width(data) is None:
            problems.append(f"samples/{path.name} is not a PNG file.")
        elif len(data) > MOST_SAMPLE_BYTES:
            problems.append(f"samples/{path.name} is too large to embed ({len(data) / 1e6:.1f} MB).")
        else:
            pictures.append((path, data))
    return pictures
