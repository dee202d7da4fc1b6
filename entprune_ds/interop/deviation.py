"""How far a model's output moves under the formulas of another code base, measured on fixed random inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from entprune_ds.interop.source import Source, model_on_file
from entprune_ds.models.dit import DiT
from entprune_ds.rng import generator_for

NUM_INPUTS = 4


def formula_deviation(source: Source, *, frequency_shift: float, norm_eps: float) -> dict[str, Any]:
    """Output difference between the model's own formulas and others, on 4 fixed random inputs; empty when equal.

    Args:
        source: the model.
        frequency_shift: that of the other code (official 0, diffusers 1).
        norm_eps: its epsilon before the MLP.

    Returns:
        max_abs_difference and mean_abs_difference, spread (standard deviation of the model's own output, the scale
        to judge them by), and both pairs of constants.
    """
    ours = {"frequency_shift": source.model.frequency_shift, "norm_eps": source.model.norm_eps}
    theirs: dict[str, Any] = {"frequency_shift": frequency_shift, "norm_eps": norm_eps}
    if ours == theirs:
        return {}
    own = _outputs(source)
    difference = (own - _outputs(replace(source, model=replace(source.model, **theirs)))).abs()
    return {
        "max_abs_difference": float(difference.max()), "mean_abs_difference": float(difference.mean()),
        "spread": float(own.std()), "inputs": NUM_INPUTS, "trained_with": ours, "exported_with": theirs,
    }  # fmt: skip


def deviation_text(found: dict[str, Any], format: str) -> str:
    """The measurement as one sentence for the user."""
    a, b = found["trained_with"], found["exported_with"]
    keys = ", ".join(f"{k} {b[k]:g} instead of {a[k]:g}" for k in a if a[k] != b[k])
    text = f"The {format} code computes this model with {keys}: on {found['inputs']} random inputs its output differs "
    return text + f"by up to {found['max_abs_difference']:.3g} (spread of the output: {found['spread']:.3g})."


def _outputs(source: Source) -> Tensor:
    """(4,C,H,W) f64, computed in fp32."""
    model: DiT = model_on_file(source)
    m, generator = source.model, generator_for(0, "interop/deviation")
    z_t = torch.randn(NUM_INPUTS, m.in_channels, m.input_size, m.input_size, generator=generator)
    t = (torch.arange(NUM_INPUTS) + 0.5) / NUM_INPUTS  # (N,) spread over [0, 1]
    labels = torch.arange(NUM_INPUTS) * m.num_classes // NUM_INPUTS  # (N,)
    with torch.no_grad():
        return model(z_t, (t * 1000).long() if m.process == "dit" else t, labels).double()
