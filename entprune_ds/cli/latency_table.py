"""Latency of forward passes: depth x batch x precision x compile, beside parameters and multiply-accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.evaluation.latency import Model, measure_latency, speedup
from entprune_ds.interop.source import Source, keep_blocks, loaded_model
from entprune_ds.interop.weights import opened
from entprune_ds.models.registry import count_macs, count_parameters

COLUMNS = (
    "depth", "parameters", "macs", "batch", "precision", "compile", "median_ms", "p10_ms", "p90_ms",
    "images_per_second", "speedup",
)  # fmt: skip


def table_problems(config: Config) -> list[str]:
    """What the table asks for and this machine does not have."""
    evaluate = config.evaluate
    if evaluate.latency_table and "tf32" in evaluate.latency_precisions and not torch.cuda.is_available():
        return ["`evaluate.latency_precisions`: tf32 needs a GPU. Leave it out."]
    return []


def check_depths(config: Config, depths: list[int]) -> None:
    """Refuse a table of depths that the deepest of the models does not have.

    Raises:
        ValueError: naming them.
    """
    too_deep = [depth for depth in config.evaluate.latency_depths if depth > max(depths)]
    if too_deep:
        raise ValueError(
            f"`evaluate.latency_depths`: {too_deep} is more than the {max(depths)} blocks of the deepest model."
        )


def measure_table(config: Config, weights: dict[str, Path]) -> list[dict[str, Any]]:
    """One row per depth, batch, precision and compile; all variants of a batch size take turns in every repeat.

    Args:
        weights: the model as "pruned", and the baseline as "base" where there is one.

    Returns:
        Rows with COLUMNS; `speedup` is over the first row of the same batch, the median of paired ratios.
    """
    evaluate, device = config.evaluate, comm.device()
    sources = {name: opened(folder, config.model) for name, folder in weights.items()}
    deepest = max(sources.values(), key=lambda source: len(source.model.blocks))
    depths = evaluate.latency_depths or tuple(sorted({len(s.model.blocks) for s in sources.values()}, reverse=True))
    variants: dict[str, tuple[ModelConfig, str, bool]] = {}
    models: dict[str, Model] = {}
    for depth in depths:
        same = [s for s in sources.values() if len(s.model.blocks) == depth]
        source = same[0] if same else keep_blocks(deepest, deepest.model.blocks[:depth])
        for precision in evaluate.latency_precisions:
            for compiled in evaluate.latency_compile:
                name = f"{depth}/{precision}/{compiled}"
                variants[name] = source.model, precision, compiled
                models[name] = _variant(source, precision, compiled).to(device)
    m = deepest.model
    measured = measure_latency(
        models, batch_sizes=evaluate.latency_batches, shape=(m.in_channels, m.input_size, m.input_size),
        num_classes=m.num_classes, repeats=evaluate.latency_repeats, device=device,
    )  # fmt: skip
    first, rows = next(iter(models)), []
    for name, (model, precision, compiled) in variants.items():
        ratios, facts = (
            speedup(measured, first, name),
            {"parameters": count_parameters(model), "macs": count_macs(model)},
        )
        for batch, times in measured[name].items():
            median = float(times["median_ms"])  # type: ignore[arg-type]
            rows.append(
                {"depth": len(model.blocks), **facts, "batch": batch, "precision": precision, "compile": compiled}
                | {key: times[key] for key in ("median_ms", "p10_ms", "p90_ms")}
                | {"images_per_second": 1000 * batch / median, "speedup": ratios[batch]}
            )
    return rows


class _Cast(nn.Module):
    """A model in another precision behind inputs and outputs of fp32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype, tf32: bool):
        super().__init__()
        self.net, self.dtype, self.tf32 = net.to(dtype), dtype, tf32

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        return self.net(z_t.to(self.dtype), t, labels).float()


def _variant(source: Source, precision: str, compiled: bool) -> nn.Module:
    net = loaded_model(source)
    if compiled:
        for block in net.blocks.values():
            block.compile()
    return _Cast(net, torch.bfloat16 if precision == "bf16" else torch.float32, precision == "tf32")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, with where they were measured."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    forms = {"parameters": "{:,}", "macs": "{:,}", "images_per_second": "{:.1f}", "speedup": "{:.2f}"}
    forms |= {key: "{:.3f}" for key in ("median_ms", "p10_ms", "p90_ms")}
    lines = [f"Forward passes on {where}, torch {torch.__version__}; medians of interleaved repeats.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(forms.get(key, "{}").format(row[key]) for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
