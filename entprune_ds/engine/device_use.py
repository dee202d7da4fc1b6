"""How well a device is used: model FLOPs utilisation and memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from entprune_ds import comm
from entprune_ds.config import ModelConfig
from entprune_ds.models.registry import count_macs

PEAK_TFLOPS = (
    ("B200", 2250.0), ("H200", 989.0), ("GH200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0),
    ("A100", 312.0), ("A800", 312.0), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0), ("A40", 149.7), ("L40S", 362.0),
    ("L4", 121.0),
)  # fmt: skip
"""Dense bf16 peak by device name, from the data sheets; the first name that occurs in the device's counts."""


def peak_tflops(setting: float | None, dtype: torch.dtype) -> float | None:
    """Peak of one device: `monitor.peak_tflops`, else that of a known GPU in bf16, else None."""
    if setting is not None:
        return setting
    if comm.device().type != "cuda" or dtype != torch.bfloat16:
        return None  # in fp32 it depends on TF32: the user says
    return known_peak(torch.cuda.get_device_name())


def known_peak(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS if set(name.split()) <= set(words)), None)


def step_flops(model: ModelConfig, global_batch_size: int) -> float:
    """Floating-point operations of a training step that the model asks for: two per MAC, backward twice the forward.

    Recomputed activations and a teacher are work, but not the model's: they do not count.
    """
    return 3 * 2 * count_macs(model) * global_batch_size


def memory() -> dict[str, float]:
    """Memory of this rank in GiB: resident memory of the process; on a GPU also peaks since the last call."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    values = {"train/memory_rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}
    if comm.device().type == "cuda":
        values["train/memory_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        values["train/memory_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return values
