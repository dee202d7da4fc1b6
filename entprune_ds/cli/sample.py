"""`entprune-ds sample`: draw samples of an exported model as a PNG folder or an npz, with a grid beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from entprune_ds.cli.common import help_text, refuse, split_shortcuts, wants_help, with_run
from entprune_ds.config import Config, ConfigError, PruneConfig, SoftConfig, load_config, problems_of

HELP = """\
Draw samples of an exported model: a folder of PNG files (or one .npz, arr_0 uint8 NHWC and arr_1 labels), a grid
OUT_grid.png, and OUT_protocol.json with everything that the samples depend on.

  entprune-ds sample run=runs/demo                                  settings and model of a run
  entprune-ds sample weights=demo_model out=samples.npz sample.num_samples=1000 sample.cfg_scale=1.5
"""
SECTIONS = ["sample"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 2 refused)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        words, folder = with_run(split_shortcuts(words, {"out": "sample.out", "weights": "model.weights"}), "sample")
        config = load_config(words, check=_problems)
        out = Path(config.sample.out or (folder / "samples" / "final.npz" if folder else "samples.npz"))
        check_output(out)
        images, labels, protocol = draw(config, Path(config.model.weights))
        save(images, labels, protocol, out, config.sample.grid)
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])
    print(f"{len(images)} samples of depth {protocol['depth']}: {out}, {grid_path(out)}")
    return 0


def _problems(config: Config) -> list[str]:
    if not config.model.weights:
        missing = "`model.weights` is missing: give an exported model, weights=DIR or run=RUNS/NAME."
        return [*problems_of(config), missing]
    return sampling_problems(config, Path(config.model.weights))


def sampling_problems(config: Config, weights: Path, key: str = "model.weights") -> list[str]:
    """Problems of sampling an export, which the setting `key` names: its architecture counts, not the settings'."""
    from entprune_ds.interop.weights import diffusion_problems, open_weights

    try:
        source = open_weights(weights, assumed=config.model)
    except ValueError as error:
        return [*problems_of(config), f"`{key}`: {error}"]
    model = source.model
    found = problems_of(replace(config, model=model, prune=PruneConfig(), soft=SoftConfig()))
    found += diffusion_problems(config.diffusion, source, weights)
    if model.in_channels not in (1, 3) and not config.sample.vae:
        message = f"`sample.vae` is missing: {weights} makes latents of {model.in_channels} channels, not images. "
        found.append(message + "Give the VAE that they were encoded with, e.g. sample.vae=stabilityai/sd-vae-ft-ema.")
    return found


def draw(config: Config, weights: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Samples of a model whose `sampling_problems` are none.

    Returns:
        images uint8 (N,H,W,C), labels i64 (N,), and the protocol as plain values.

    Raises:
        ValueError: when the weights cannot be read.
    """
    import torch

    from entprune_ds import comm
    from entprune_ds.diffusion.sampling import build_sampler, sampling_protocol
    from entprune_ds.evaluation.generate import generate, make_labels
    from entprune_ds.interop.source import loaded_model
    from entprune_ds.interop.vae import load_vae
    from entprune_ds.interop.weights import opened
    from entprune_ds.logs import progress

    sample, source = config.sample, opened(weights, config.model)
    architecture, facts = source.model, source.facts
    vae = load_vae(sample.vae, sample.vae_revision, comm.device()) if sample.vae else None
    model = loaded_model(source).to(comm.device())
    sampler = build_sampler(architecture, config.diffusion, sample)
    labels = make_labels(sample.labels, sample.num_samples, architecture.num_classes, sample.seed)
    side = architecture.input_size

    def sample_fn(noise: torch.Tensor, y: torch.Tensor, noise_at: Callable[[int], torch.Tensor]) -> torch.Tensor:
        drawn = sampler(model, noise, y, noise_at)
        return vae.decode(drawn) if vae else drawn  # latents (N,C,h,w) -> pixels (N,3,H,W)

    with progress("sample", total=sample.num_samples) as line:
        images = generate(
            sample_fn, labels.to(comm.device()),
            shape=(architecture.in_channels, side, side), seed=sample.seed, batch_size=sample.batch_size,
            on_batch=line.update,
        )  # fmt: skip
    protocol = {
        "num_samples": sample.num_samples, **sampling_protocol(architecture, config.diffusion, sample),
        "labels": sample.labels, "seed": sample.seed, "weights": facts["weights"],
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32), "depth": len(architecture.blocks),
        "kept_blocks": list(architecture.blocks), "step": facts["step"], "model": str(weights),
        **(vae.protocol if vae else {"vae": "none (pixels)"}),
    }  # fmt: skip
    return images, labels.numpy(), protocol


def check_output(out: Path) -> None:
    """Refuse what cannot be written before hours are spent on it.

    Raises:
        ValueError: a folder with files in it, a file that is no .npz, or a parent that is a file.
    """
    blocked = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"`out`: {blocked} is a file, so {out} cannot be written. Choose another `out`.")
    if out.suffix != ".npz" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out`: {out} exists already. Empty it, or choose another folder (or a path in .npz).")


def grid_path(out: Path) -> Path:
    """Where the PNG grid of an output lies."""
    return out.with_name(f"{out.stem}_grid.png")


def protocol_path(out: Path) -> Path:
    """Where the protocol of an output lies."""
    return out.with_name(f"{out.stem}_protocol.json")


def save(images: np.ndarray, labels: np.ndarray, protocol: dict[str, Any], out: Path, grid: int) -> None:
    """Write the samples, their grid (as many per class as possible) and their protocol."""
    from entprune_ds.evaluation.images import save_folder, save_grid, save_npz

    out.parent.mkdir(parents=True, exist_ok=True)
    (save_npz if out.suffix == ".npz" else save_folder)(images, labels, out)
    if images.shape[3] in (1, 3):
        save_grid(images[by_class(labels)[:grid]], grid_path(out))
    protocol_path(out).write_text(json.dumps(protocol, indent=2))


def by_class(labels: np.ndarray) -> np.ndarray:
    """Indices that go through the classes in turn: first of each class, second of each class, ..."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, turn))


if __name__ == "__main__":
    sys.exit(main())
