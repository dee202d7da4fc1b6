"""The common look of all figures, and the small things that drawing them needs.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; nothing is said by colour alone.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .numbers import sensible

BLUE, ORANGE, RED, GREY, PALE = "#0072B2", "#E69F00", "#D55E00", "#6b7280", "#d9dce1"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "text.parse_math": False,  # a "$" in a name is a dollar sign
}


def as_png(draw: Callable[..., Figure | None]) -> Callable[..., bytes | None]:
    """Run a drawing function in our style and return its figure as PNG bytes. No global state of pyplot is touched."""

    @wraps(draw)
    def inner(*args: Any, **kwargs: Any) -> bytes | None:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            if figure is None:
                return None
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
            return buffer.getvalue()

    return inner


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure (inches) with one set of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def step_axis(axes: Axes) -> None:
    """Label the x axis as optimizer steps."""
    axes.set_xlabel("step")
    axes.margins(x=0.015)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: sensible(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def averaged(steps: Sequence[float], values: Sequence[float], groups: int) -> tuple[list[float], list[float]]:
    """Means of `groups` runs of neighbouring points; a NaN makes its group NaN, so gaps stay visible."""
    edges = np.linspace(0, len(steps), groups + 1).astype(int)
    runs = list(itertools.pairwise(edges))
    return [float(np.mean(steps[a:b])) for a, b in runs], [float(np.mean(values[a:b])) for a, b in runs]


def label(text: str) -> str:
    """A name from data as the renderer can take it: printable and short."""
    clean = "".join(c for c in text if c.isprintable())  # lone surrogates and control characters are not
    return clean if len(clean) <= 40 else clean[:39] + "…"
