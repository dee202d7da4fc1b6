"""From a checkpoint to an exported model: weights only, one process, no DeepSpeed engine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from entprune_ds.config import config_from_dict, digest, to_dict
from entprune_ds.engine.checkpoint import Checkpoint, range_reader
from entprune_ds.environment import commit
from entprune_ds.interop.safetensors import save_model


def export_checkpoint(checkpoint: Checkpoint, out: Path, weights: str) -> Path:
    """Write model.safetensors and config.json. Local.

    Args:
        checkpoint: an intact checkpoint.
        out: folder of the export.
        weights: "ema" or "raw".

    Raises:
        OSError: when `out` cannot be written.
    """
    key = {"ema": "ema", "raw": "weight"}[weights]
    shapes = {n: tuple(s) for n, s in checkpoint.manifest["shapes"].items()}
    read_range = range_reader(checkpoint)

    def read(name: str) -> Tensor:
        return read_range(name, 0, math.prod(shapes[name]))[key].view(shapes[name])

    config = config_from_dict(checkpoint.manifest["record"]["config"])
    model = replace(config.model, kept_blocks=checkpoint.kept_blocks)
    facts = {
        "weights": weights,
        "step": checkpoint.step,
        "diffusion": to_dict(config)["diffusion"],
        "config_digest": digest(checkpoint.manifest["record"]["config"]),
        "commit": commit(),
    }
    return save_model(out, shapes, read, model, facts)
