"""`entprune-ds export`: from the newest checkpoint of a run to model.safetensors and config.json."""

from __future__ import annotations

import sys
from pathlib import Path

from entprune_ds.cli.common import refuse, wants_help

HELP = """\
usage: entprune-ds export run=RUNS/NAME [out=DIR] [weights=ema|raw] [--help]

Writes the newest intact checkpoint of a run as an ordinary model folder: model.safetensors (fp32 weights,
named by original block index) and config.json (architecture, kept_blocks, step, commit, config digest).

  run=FOLDER     a run folder with checkpoints/
  out=DIR        folder to write (default: FOLDER/model)
  weights=ema    moving average of the weights (default); raw = the training weights

example:
  entprune-ds export run=runs/demo out=demo_model
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 2 refused)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(HELP, end="")
        return 0
    given = dict(w.partition("=")[::2] for w in words)
    problems = [
        f"`{w}` is not a setting of export. Known: run, out, weights."
        for w in given
        if w not in ("run", "out", "weights")
    ]
    weights, folder = given.get("weights", "ema"), Path(given.get("run", ""))
    if weights not in ("ema", "raw"):
        problems.append(f"`weights` must be ema or raw, got {weights}.")
    if "run" not in given:
        problems.append("`run` is missing: name a run folder, e.g. run=runs/demo.")
    elif not (folder / "checkpoints").is_dir():
        problems.append(f"`run`: {folder} has no checkpoints. Give RUNS/NAME of a training run.")
    if problems:
        return refuse(problems)
    from entprune_ds.comm import DistributedError
    from entprune_ds.engine.checkpoint import find_checkpoint
    from entprune_ds.export import export_checkpoint

    try:
        checkpoint = find_checkpoint(folder / "checkpoints", lambda text: print(f"warning: {text}", file=sys.stderr))
    except DistributedError as error:
        return refuse([str(error)])
    if checkpoint is None:
        return refuse([f"{folder / 'checkpoints'} holds no checkpoint. Train first."])
    try:
        out = export_checkpoint(checkpoint, Path(given.get("out", folder / "model")), weights)
    except OSError as error:
        return refuse([f"cannot write the export: {error}. Choose another `out` or free space."])
    print(f"step {checkpoint.step}, blocks {list(checkpoint.kept_blocks)}, {weights} weights: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
