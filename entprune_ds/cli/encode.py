"""`entprune_ds.cli.encode`: shards of pixels to shards of VAE moments, on all GPUs of all nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from entprune_ds.cli.common import help_text, launched_words, leave, refuse, split_shortcuts, wants_help
from entprune_ds.config import Config, ConfigError, load_config
from entprune_ds.config_checks import image_problems
from entprune_ds.launcher import launch_problems
from entprune_ds.plain_json import parse_json

if TYPE_CHECKING:
    from entprune_ds.data.index import Index

HELP = """\
Encode images once, so that training of a latent model reads small files: the VAE's moments (mean and log-variance) of
every image and of its mirror image. Training draws the latents and the flips anew in every epoch.

  deepspeed --num_gpus 8 --module entprune_ds.cli.encode data.shards=data/in256 out=data/in256_latents sample.vae=VAE
  torchrun --nproc_per_node 8 -m entprune_ds.cli.encode data.shards=... out=... sample.vae=...
  sbatch --nodes 4 slurm/encode_latents.sh data.shards=... out=... sample.vae=...
  entprune-ds encode data.shards=... out=... sample.vae=...           (one process)

  data.shards=DIR   pixels written by `entprune-ds shards`; with DIR/train and DIR/val, out gets both
  out=DIR           folder to write, which all nodes must see (short for data.out=DIR)
  sample.vae=VAE    folder of a diffusers AutoencoderKL, or a hub name such as stabilityai/sd-vae-ft-ema

Every rank writes shards of its own. The same command goes on after the finished shards, on any number of ranks, and
repairs damaged ones, which it names; a second job for the same folder is refused. --dry-run counts, and stops.
"""
SECTIONS = ["data"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed on the way, 2 refused before any work."""
    words, dry_run = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        config = load_config(split_shortcuts(words, {"out": "data.out"}), check=_problems)
        folders = find_folders(config)
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])
    if dry_run:
        return _describe(folders, config.data.allow_pipe)
    from entprune_ds import comm

    try:
        return encode(config, folders)
    except (ValueError, OSError) as error:
        return refuse([str(error)])
    except comm.DistributedError as error:
        refuse(str(error).splitlines())
        return 1
    except RuntimeError as error:  # of a collective: everything else is reported by the rank that it happens to
        reason = str(error).splitlines()[0]
        refuse([f"another rank is gone ({reason}). What is finished stays: the same command goes on."])
        return 1
    finally:
        comm.shutdown()


def _problems(config: Config) -> list[str]:
    found = launch_problems() + image_problems(config)
    required = {"data.shards": config.data.shards, "data.out": config.data.out, "sample.vae": config.sample.vae}
    return found + [f"`{key}` is missing. See --help." for key, value in required.items() if not value]


def find_folders(config: Config) -> dict[str, tuple[str, Path]]:
    """{name: (shards to read, folder to write)}: train and val of data.shards, or the shards that it names itself."""
    source, out = Path(config.data.shards), Path(config.data.out)
    names = [name for name in ("train", "val") if (source / name / "index.json").is_file()]
    if names and not (source / "index.json").is_file():
        return {name: (str(source / name), out / name) for name in names}
    return {"shards": (config.data.shards, out)}


def _describe(folders: dict[str, tuple[str, Path]], allow_pipe: bool) -> int:
    """--dry-run: what there is to encode."""
    from entprune_ds.data.index import ShardError, load_index

    for name, (source, out) in folders.items():
        try:
            index = load_index(source, allow_pipe)
        except ShardError as error:
            return refuse([str(error)])
        if os.environ.get("RANK", "0") == "0":
            shape = "x".join(map(str, index.shape))
            print(f"{name}: would encode {index.total} {index.kind} {shape} in {len(index.shards)} shards, to {out}")
    return 0


def encode(config: Config, folders: dict[str, tuple[str, Path]]) -> int:
    """Encode every folder; all ranks call. Returns the exit status.

    Raises:
        ValueError: when shards or VAE cannot be used.
        comm.DistributedError: on all ranks, when one failed.
    """
    import torch

    from entprune_ds import comm
    from entprune_ds.cli.train import limit_threads
    from entprune_ds.data.encode import encode_shards
    from entprune_ds.data.index import load_index
    from entprune_ds.faults import locked_by_job
    from entprune_ds.interop.vae import load_vae
    from entprune_ds.logs import progress

    indices = {name: load_index(source, config.data.allow_pipe) for name, (source, _) in folders.items()}
    limit_threads()
    if "RANK" in os.environ:
        comm.init(config.run.timeout_seconds)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # 0.001 of error in fp32 otherwise
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    batch_size, device = config.data.encode_batch, comm.device()
    try:
        vae = load_vae(config.sample.vae, config.sample.vae_revision, device, batch_size)
    except ValueError as error:
        raise ValueError(f"`sample.vae`: {error}") from error
    facts = {"source": "vae moments", **vae.protocol, "dtype": config.data.encode_dtype}

    def moments(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.data.encode_dtype == "bfloat16"):
            return vae.encode(images)

    with locked_by_job([out for _, out in folders.values()], "`out`"):
        for name, index in indices.items():
            out = folders[name][1]
            with progress(f"encode, {name}", total=index.total) as line:
                result = encode_shards(
                    index, out, moments, {**facts, "split": name}, batch_size=batch_size, classes=class_names(index),
                    watch=line.update,
                )  # fmt: skip
            if comm.is_main():
                print(f"{name}: {result['total']} examples in {len(result['shards'])} shards, {out}", flush=True)
    return 0


def class_names(index: Index) -> tuple[str, ...] | None:
    """The class names beside a local index, where there are any."""
    path = Path(str(index.folder), "classes.json")
    return tuple(parse_json(path.read_text())) if path.is_file() else None


if __name__ == "__main__":
    leave(main())
