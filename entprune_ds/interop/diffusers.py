"""Models of diffusers: DiTPipeline and DiTTransformer2DModel folders, in and out. The package itself is not needed.

Where diffusers computes otherwise than the official code (read in diffusers 0.42.1):
- its timestep frequencies are 10000^(-i / (half - 1)): frequency_shift 1;
- `norm_eps` of its config reaches the norm before the MLP alone, the other two are fixed at 1e-6, as in ModelConfig;
- every block owns a copy of the timestep and label embedders; the head uses those of block 0. We have one: a folder
  whose copies differ (trained apart) is refused, and on the way out the one is copied into every block.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entprune_ds.config import ModelConfig, config_from_dict, model_problems
from entprune_ds.interop.beside import read_beside
from entprune_ds.interop.infer import disagreement
from entprune_ds.interop.safetensors import read_description
from entprune_ds.interop.source import Source
from entprune_ds.interop.tensors import Reader, Shapes, key_report, open_tensors, parameter_shapes
from entprune_ds.plain_json import parse_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
BESIDE = "entprune_ds.json"
"""Our description beside config.json: original block indices and what the weights were trained with."""
FREQUENCY_SHIFT = 1.0
FIXED = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0, "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero", "upcast_attention": False,
}  # fmt: skip
"""Settings of a diffusers config with which the model is a DiT as we know it."""
SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}  # fmt: skip
"""Our one embedder: its copy in every block, under norm1.emb."""
ENDS = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}  # fmt: skip
IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",), "adaLN_modulation.1": ("norm1.linear",),
}  # fmt: skip


def diffusers_names(name: str, position: dict[str, int]) -> list[list[str]]:
    """Where one of our parameters lies in a diffusers file.

    Args:
        name: our name, with the original block index.
        position: {original block index: index of the transformer block in the file}.

    Returns:
        Copies of it, each as the names of its parts along the first axis (q, k, v).
    """
    layer, kind = name.rsplit(".", 1)
    if layer in SHARED:
        return [[f"transformer_blocks.{i}.norm1.emb.{SHARED[layer]}.{kind}"] for i in position.values()]
    if layer in ENDS:
        return [[f"{ENDS[layer]}.{kind}"]]
    _, block, inner = layer.split(".", 2)
    return [[f"transformer_blocks.{position[block]}.{part}.{kind}" for part in IN_BLOCK[inner]]]


def positions(model: ModelConfig) -> dict[str, int]:
    """{original block index: index without gaps}."""
    return {str(block): i for i, block in enumerate(model.blocks)}


def diffusers_shapes(model: ModelConfig) -> Shapes:
    """{diffusers name: shape} of an architecture."""
    shapes: Shapes = {}
    for name, (first, *rest) in parameter_shapes(model).items():
        for parts in diffusers_names(name, positions(model)):
            shapes |= {part: (first // len(parts), *rest) for part in parts}
    return shapes


def open_diffusers(folder: Path, given: dict[str, Any] | None = None) -> Source:
    """A DiTPipeline folder, or the folder of its transformer; safetensors only, no code of the folder is run.

    The model computes what diffusers computes: frequency_shift 1 and the norm_eps of its config, unless `given` says
    otherwise (weights of the official release, converted without training, were made with 0 and 1e-6), or the
    description beside it (our exports) does.

    Args:
        folder: the folder.
        given: model settings that the user stated (num_classes and kept_blocks are changed later, by the caller).

    Raises:
        ValueError: a damaged or incomplete folder, another architecture, keys that do not fit (all listed), depths
            that differ between its files, or blocks whose embedders differ from each other.
    """
    folder = transformer_folder(folder)
    path = folder / WEIGHTS
    values = _config(folder)
    if not path.is_file():
        message = f"{folder} has no {WEIGHTS}: only safetensors in one file are read. "
        raise ValueError(
            message + "Save it with save_pretrained(..., safe_serialization=True, max_shard_size='100GB')."
        )
    given = {k: v for k, v in (given or {}).items() if k not in ("num_classes", "kept_blocks", "weights")}
    shapes, read = open_tensors(path)
    _check_depth(values.get("num_layers"), shapes, folder)
    source = read_beside(folder / BESIDE, shapes, diffusers_shapes, lambda model: _reader(model, read))
    if source is None:
        free = {k: given[k] for k in ("norm_eps", "frequency_shift") if k in given}
        model = replace(_architecture(values, folder), **free)
        facts = {"weights": "plain", "step": 0, "source": f"diffusers folder {_title(folder)}"} | _licence(folder)
        source = Source(model, _reader(model, read), facts)
    model = source.model
    wrong = [disagreement(k, v, getattr(model, k), folder) for k, v in given.items() if v != getattr(model, k)]
    if wrong:
        raise ValueError(" ".join(wrong))
    problems = key_report(diffusers_shapes(model), shapes)
    if problems:
        raise ValueError(f"{path} does not fit its config.json: " + "; ".join(problems))
    _check_copies(model, read, path)
    return source


def transformer_folder(folder: Path) -> Path:
    """The folder of the transformer itself: a pipeline, and our export of a SiT, hold it as a sub-folder."""
    inner = folder / "transformer"
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder


def _reader(model: ModelConfig, read: Reader) -> Reader:
    def one(name: str) -> Tensor:
        parts = [read(part) for part in diffusers_names(name, positions(model))[0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return one


def _check_depth(num_layers: object, shapes: Shapes, folder: Path) -> None:
    """Refuse a depth in config.json other than that of the weights, or of our description beside them."""
    stored = {int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)\.", name) for name in shapes) if m}
    if isinstance(num_layers, int) and num_layers != len(stored):
        message = f"{folder / 'config.json'} has num_layers {num_layers}, but {WEIGHTS} holds {len(stored)} blocks. "
        raise ValueError(message + f"Copy both from the same place, or set num_layers to {len(stored)}.")
    try:
        kept = list(read_description(folder / BESIDE)[0].blocks)
    except ValueError:
        return  # none, or some other JSON file of the user
    if num_layers != len(kept):
        message = f"{folder / 'config.json'} has num_layers {num_layers}, but {BESIDE} beside it has kept_blocks "
        message += f"{kept}: {len(kept)} blocks. Copy all files from the same export, or delete {BESIDE} (the blocks "
        raise ValueError(message + "are then counted from 0).")


def _check_copies(model: ModelConfig, read: Reader, path: Path) -> None:
    """Refuse embedders that differ between blocks: one shared embedder cannot compute what they do."""
    different = set()
    for name in parameter_shapes(model):
        first, *others = diffusers_names(name, positions(model))
        for (copy,) in others:
            if not torch.equal(read(copy), read(first[0])):
                different.add(int(copy.split(".")[1]))
    if different:
        message = f"{path}: the timestep or label embedders of blocks {sorted(different)} differ from those of block 0 "
        message += "(diffusers trains a copy per block). A DiT has one: it would compute something else. "
        raise ValueError(message + "Train with shared embedders, or start from weights before that training.")


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = parse_json((folder / "config.json").read_text())
        name = values.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}.") from error
    if name not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"{folder} holds a {name}, not a DiTTransformer2DModel (nor a DiTPipeline).")
    odd = {k: values[k] for k, v in FIXED.items() if k in values and values[k] != v}
    if odd:
        raise ValueError(f"{folder / 'config.json'} describes another model than a DiT: {odd} instead of {FIXED}.")
    return values


def _architecture(values: dict[str, Any], folder: Path) -> ModelConfig:
    try:
        heads, channels = values["num_attention_heads"], values["in_channels"]
        settings = {
            "process": "dit", "depth": values["num_layers"], "num_heads": heads, "in_channels": channels,
            "hidden_size": heads * values["attention_head_dim"], "patch_size": values["patch_size"],
            "input_size": values["sample_size"], "num_classes": values["num_embeds_ada_norm"],
            "learn_sigma": values.get("out_channels") == 2 * channels, "norm_eps": values.get("norm_eps", 1e-5),
            "frequency_shift": FREQUENCY_SHIFT,
        }  # fmt: skip
        model = config_from_dict({"model": settings}).model
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} lacks a setting or has one of another kind: {error}.") from error
    wrong = model_problems(model)
    if wrong:
        raise ValueError(f"{folder / 'config.json'} has an impossible architecture: " + " ".join(wrong))
    return model


def _title(folder: Path) -> str:
    return folder.parent.name if folder.name == "transformer" else folder.name


def _licence(folder: Path) -> dict[str, str]:
    """`license:` at the head of a model card, where there is one."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file():
            found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(errors="replace")[:4000], re.MULTILINE)
            if found:
                return {"source_license": found[1]}
    return {}
