"""`entprune-ds export`: a run, or any model, to an export folder, an official .pt file or a diffusers folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entprune_ds.cli.common import model_settings, refuse, wants_help
from entprune_ds.config import ConfigError

if TYPE_CHECKING:
    from entprune_ds.interop.source import Source

HELP = """\
usage: entprune-ds export (run=RUNS/NAME | src=MODEL) [out=PATH] [format=entprune|official|diffusers]
                          [weights=ema|raw] [vae=FOLDER] [model.kept_blocks=[...]] [--help]

Writes the newest intact checkpoint of a run, or another model, as ordinary weights. Pruned models stay ordinary:

  format=entprune   a folder (default): model.safetensors (fp32, named by original block index) and config.json
  format=official   a .pt state dict for the public DiT or SiT code, which loads it with only `depth` changed;
                    OUT.json beside it holds what a state dict cannot
  format=diffusers  a folder: a DiT as a DiTPipeline with only `num_layers` changed, a SiT as its transformer alone.
                    diffusers computes the timestep frequencies otherwise than the official code: for weights that
                    were not trained with it, the change of the output is measured, printed and stored

Every format carries kept_blocks, the source's licence, the commit and the config digest.

  run=FOLDER        a run folder with checkpoints/
  src=MODEL         instead of a run: an export folder, or anything that `entprune-ds import` reads
  out=PATH          file or folder to write (a run's default: FOLDER/model, FOLDER/model.pt, FOLDER/model_diffusers)
  weights=ema       moving average of the weights (default); raw = the training weights (of a run, or of a .pt
                    training checkpoint given as src)
  vae=FOLDER        format=diffusers: a VAE to put into the pipeline
  model.kept_blocks=[0,1,5]   drop all other blocks, by original index

examples:
  entprune-ds export run=runs/demo out=demo_model
  entprune-ds export run=runs/xl format=official out=DiT-XL-2-depth14.pt
  entprune-ds export src=demo_model format=diffusers out=demo_diffusers model.kept_blocks=[0,2,3]
"""
WORDS = ("run", "src", "out", "format", "weights", "vae")
DEFAULT_OUT = {"entprune": "model", "official": "model.pt", "diffusers": "model_diffusers"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 2 refused)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(HELP, end="")
        return 0
    given = dict(w.partition("=")[::2] for w in words if not w.startswith("model."))
    try:
        model = model_settings([w for w in words if w.startswith("model.")])
        problems = _problems(given, model)
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        problems = [f"a path cannot be looked at: {error}. Correct it, or its permissions."]
    if problems:
        return refuse(problems)
    from entprune_ds.comm import DistributedError
    from entprune_ds.export import change, write_model

    form = given.get("format", "entprune")
    out = Path(given.get("out") or Path(given["run"]) / DEFAULT_OUT[form])
    try:
        source = change(_source(given), model)
        notes = write_model(source, out, form, Path(given["vae"]) if given.get("vae") else None)
    except (DistributedError, ValueError) as error:
        return refuse([str(error)])
    except OSError as error:
        return refuse([f"cannot write the export: {error}. Choose another `out` or free space."])
    for note in notes:
        print(note)
    facts = source.facts
    print(f"step {facts['step']}, blocks {list(source.model.blocks)}, {facts['weights']} weights: {out}")
    return 0


def _problems(given: dict[str, str], model: dict[str, object]) -> list[str]:
    problems = [f"`{w}` is not a setting of export. Known: {', '.join(WORDS)}." for w in given if w not in WORDS]
    problems += [
        f"`model.{k}` cannot be changed by export. Known: model.kept_blocks." for k in model if k != "kept_blocks"
    ]
    weights, form = given.get("weights", "ema"), given.get("format", "entprune")
    if weights not in ("ema", "raw"):
        problems.append(f"`weights` must be ema or raw, got {weights}.")
    if form not in DEFAULT_OUT:
        problems.append(f"`format` must be one of {', '.join(DEFAULT_OUT)}, got {form}.")
    if "vae" in given and form != "diffusers":
        problems.append("`vae` goes with format=diffusers only. Leave it out.")
    if form == "official" and not given.get("out", ".pt").endswith(".pt"):
        problems.append(f"`out` must end in .pt for the official format, got {given['out']}.")
    if ("run" in given) == ("src" in given):
        problems.append("`run` is missing: name a run folder, e.g. run=runs/demo, or another model with src=MODEL.")
    elif "run" in given and not (Path(given["run"]) / "checkpoints").is_dir():
        problems.append(f"`run`: {given['run']} has no checkpoints. Give RUNS/NAME of a training run.")
    elif "src" in given and not given.get("out"):
        problems.append("`out` is missing: name the file or folder to write.")
    return problems


def _source(given: dict[str, str]) -> Source:
    """The model that the words name."""
    from entprune_ds.engine.checkpoint import find_checkpoint
    from entprune_ds.export import checkpoint_source
    from entprune_ds.interop.weights import open_weights

    if "src" in given:
        return open_weights(Path(given["src"]), given.get("weights"))
    folder = Path(given["run"]) / "checkpoints"
    checkpoint = find_checkpoint(folder, lambda text: print(f"warning: {text}", file=sys.stderr))
    if checkpoint is None:
        raise ValueError(f"{folder} holds no checkpoint. Train first.")
    return checkpoint_source(checkpoint, given.get("weights", "ema"))


if __name__ == "__main__":
    sys.exit(main())
