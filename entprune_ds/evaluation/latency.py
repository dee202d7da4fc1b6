"""Latency of forward passes: interleaved, repeated, summarised by medians.

Models take turns within every repeat, so a slow spell of the machine hits all of them alike, and a speed-up is the
median of ratios of neighbouring measurements rather than a ratio of two distant ones.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from entprune_ds import rng

PIECE_SECONDS = 0.02  # one timed piece lasts at least about this long, far above the clock's resolution
Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Latency = dict[str, dict[int, dict[str, float | list[float]]]]


def measure_latency(
    models: dict[str, Model],
    *,
    batch_sizes: Sequence[int],
    shape: tuple[int, int, int],
    num_classes: int,
    repeats: int,
    device: torch.device | str,
    warmup: int = 3,
) -> Latency:
    """Time forward passes model(z_t (N,C,H,W) f32, t (N,) f32 in [0, 1), labels (N,) i64), without gradients.

    Args:
        models: modules or callables by name, already on `device`; modules are timed in eval mode and left as they were.
        batch_sizes: N of the passes.
        shape: (C, H, W) of z_t.
        num_classes: labels are 0..num_classes - 1.
        repeats: timed pieces per model and batch size; even repeats visit the models in the given order, odd ones
            backwards.
        device: where the inputs go; on a GPU, time is taken by events on the stream.
        warmup: passes of each model before any is timed.

    Returns:
        {name: {batch: {"median_ms", "p10_ms", "p90_ms": per pass, "repeats_ms": [one per repeat, in order]}}}.

    Raises:
        ValueError: no model, or a number below 1.
    """
    if not models or min(repeats, warmup, num_classes, *batch_sizes) < 1 or not batch_sizes:
        got = f"{repeats=}, {warmup=}, {num_classes=}, batch_sizes={list(batch_sizes)}, {len(models)} models"
        raise ValueError(f"latency needs a model, a batch size, and numbers of at least 1, got {got}.")
    device = torch.device(device)
    result: Latency = {name: {} for name in models}
    with _eval_mode(models.values()), torch.inference_mode():
        for batch in batch_sizes:
            inputs = _inputs(batch, shape, num_classes, device)
            passes = {name: _passes_per_piece(model, inputs, device, warmup) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(repeats):
                for name in list(models) if repeat % 2 == 0 else reversed(list(models)):
                    seconds = _time_piece(models[name], inputs, passes[name], device)
                    times[name].append(1000 * seconds / passes[name])
            for name, values in times.items():
                result[name][batch] = _summary(values)
    return result


def speedup(result: Latency, base: str, pruned: str) -> dict[int, float]:
    """How many times faster `pruned` is than `base`, per batch size: median over repeats of the paired ratios.

    Raises:
        ValueError: a name that was not measured.
    """
    return {batch: float(np.median(ratios)) for batch, ratios in _paired_ratios(result, base, pruned).items()}


def speedup_spread(result: Latency, base: str, pruned: str) -> dict[int, dict[str, float]]:
    """Interquartile range of the paired ratios behind `speedup`, per batch size: {"q25", "q75"}.

    Raises:
        ValueError: a name that was not measured.
    """
    found = {}
    for batch, ratios in _paired_ratios(result, base, pruned).items():
        q25, q75 = np.percentile(ratios, [25, 75]).tolist()
        found[batch] = {"q25": q25, "q75": q75}
    return found


def _paired_ratios(result: Latency, base: str, pruned: str) -> dict[int, np.ndarray]:
    """Per batch size the ratio of every repeat."""
    for name in (base, pruned):
        if name not in result:
            raise ValueError(f"{name!r} was not measured. Measured: {', '.join(result)}.")
    times = {batch: (slow, result[pruned][batch]) for batch, slow in result[base].items()}
    return {batch: np.divide(slow["repeats_ms"], fast["repeats_ms"]) for batch, (slow, fast) in times.items()}


def _inputs(batch: int, shape: tuple[int, int, int], num_classes: int, device: torch.device) -> tuple[Tensor, ...]:
    """Fixed inputs of one batch size: z_t (N,C,H,W), t (N,), labels (N,)."""
    generator = rng.generator_for(0, "latency", 0, batch)
    z_t = torch.randn((batch, *shape), generator=generator)
    t = torch.rand(batch, generator=generator)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    return z_t.to(device), t.to(device), labels.to(device)


def _passes_per_piece(model: Model, inputs: tuple[Tensor, ...], device: torch.device, warmup: int) -> int:
    """Warm up, then double the passes until a piece lasts PIECE_SECONDS."""
    _time_piece(model, inputs, warmup, device)
    passes = 1
    while _time_piece(model, inputs, passes, device) < PIECE_SECONDS:
        passes *= 2
    return passes


def _time_piece(model: Model, inputs: tuple[Tensor, ...], passes: int, device: torch.device) -> float:
    """Seconds of so many passes in a row."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()  # nothing older may run into the piece
            start.record()
            for _ in range(passes):
                model(*inputs)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    for _ in range(passes):
        model(*inputs)
    return time.perf_counter() - begin


def _summary(values: list[float]) -> dict[str, float | list[float]]:
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "repeats_ms": values}


@contextlib.contextmanager
def _eval_mode(models: Iterable[Model]) -> Iterator[None]:
    """Put modules into eval mode inside, and every submodule back into its own mode after."""
    before = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
