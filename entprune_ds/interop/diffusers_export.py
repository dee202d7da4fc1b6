"""Writing diffusers folders: a DiT as a DiTPipeline (transformer, scheduler, VAE if given), a SiT as transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from entprune_ds.atomic import replacing, write_text
from entprune_ds.config import ModelConfig
from entprune_ds.interop.beside import write_beside
from entprune_ds.interop.deviation import deviation_text, formula_deviation
from entprune_ds.interop.diffusers import (
    BESIDE,
    FIXED,
    FREQUENCY_SHIFT,
    WEIGHTS,
    diffusers_names,
    diffusers_shapes,
    positions,
)
from entprune_ds.interop.source import Source, check_full_width
from entprune_ds.interop.tensors import write_tensors

SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "clip_sample": False, "prediction_type": "epsilon", "set_alpha_to_one": True, "steps_offset": 0,
}  # fmt: skip
"""The process of DiT (linear betas, 1000 steps)."""
INDEX = {
    "_class_name": "DiTPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
NULL_CLASS = 1000
"""Label that DiTPipeline uses for guidance, whatever the number of classes."""


def write_diffusers(out: Path, source: Source, vae: Path | None = None) -> tuple[Path, dict[str, Any], list[str]]:
    """Write OUT/transformer, and for a DiT the scheduler and model_index.json around it.

    Args:
        out: folder to write.
        source: the model.
        vae: folder of a diffusers AutoencoderKL to put beside it; None leaves it to from_pretrained(..., vae=...).

    Returns:
        The folder, the facts stored in it, and what the user should know.

    Raises:
        ValueError: an architecture that diffusers has no setting for, or a folder that holds no VAE.
        OSError: when it cannot be written.
    """
    check_full_width(source, "diffusers")
    m = source.model
    if m.hidden_size * 4 != m.mlp_size:
        raise ValueError(f"diffusers' DiT has mlp_ratio 4 only, this model has {m.mlp_ratio}.")
    if vae is not None and not {"config.json", WEIGHTS} <= {p.name for p in vae.glob("*")}:
        raise ValueError(f"`vae`: {vae} is not the folder of a VAE: config.json or {WEIGHTS} is missing.")
    notes = [f"diffusers loads it with num_layers={len(m.blocks)}; nothing else changes."]
    deviation = formula_deviation(source, frequency_shift=FREQUENCY_SHIFT, norm_eps=m.norm_eps)
    if deviation:
        notes.append(deviation_text(deviation, "diffusers"))
    folder = out / "transformer"
    where = {
        part: (name, index, len(parts))
        for name in source.shapes for parts in diffusers_names(name, positions(m)) for index, part in enumerate(parts)
    }  # fmt: skip

    def read(part: str) -> Tensor:
        name, index, count = where[part]
        return source.read(name).chunk(count)[index]

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        write_tensors(temporary, diffusers_shapes(m), read)
    _write_json(folder / "config.json", transformer_config(m))
    values = write_beside(folder / BESIDE, source, deviation)
    if m.process == "sit":
        text = "A SiT is exported as a transformer only: diffusers has no pipeline for it. Sample with entprune-ds, or "
        return (
            out,
            values,
            [*notes, text + f"call DiTTransformer2DModel.from_pretrained(DIR/{folder.name}) with t in [0, 1]."],
        )
    return out, values, notes + _write_pipeline(out, m, vae)


def transformer_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a DiTTransformer2DModel."""
    return {
        "_class_name": "DiTTransformer2DModel", "num_layers": len(model.blocks),
        "num_attention_heads": model.num_heads, "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels, "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
        "sample_size": model.input_size, "patch_size": model.patch_size, "num_embeds_ada_norm": model.num_classes,
        "norm_eps": model.norm_eps, "norm_num_groups": 32, **FIXED,
    }  # fmt: skip


def _write_pipeline(out: Path, model: ModelConfig, vae: Path | None) -> list[str]:
    notes = []
    _write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    if vae is None:
        text = "It has no VAE: load it with DiTPipeline.from_pretrained(DIR, vae=AutoencoderKL.from_pretrained(...)), "
        notes.append(text + "or export with vae=FOLDER.")
    else:
        (out / "vae").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", WEIGHTS):
            with replacing(out / "vae" / name) as temporary:
                shutil.copyfile(vae / name, temporary)
    if model.num_classes != NULL_CLASS:
        text = (
            f"DiTPipeline takes label {NULL_CLASS} for guidance, but this model's null label is {model.num_classes}: "
        )
        notes.append(text + "use guidance_scale=1 there, or sample with entprune-ds.")
    _write_json(out / "model_index.json", INDEX)
    return notes


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
