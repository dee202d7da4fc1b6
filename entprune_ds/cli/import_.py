"""`entprune-ds import`: official DiT and SiT weights and diffusers folders to a model folder of ours."""

from __future__ import annotations

import sys
from pathlib import Path

from entprune_ds.cli.common import model_settings, refuse, wants_help
from entprune_ds.config import ConfigError

HELP = """\
usage: entprune-ds import src=MODEL out=DIR [model.process=dit|sit] [model.num_heads=N] [model.num_classes=N]
                          [model.kept_blocks=[...]] [weights=ema|raw] [seed=N] [license=NAME] [--help]

Reads weights of another code base and writes a model folder that every command takes as model.weights=DIR:

  a .pt file of the public DiT or SiT code   a plain state dict, or a training checkpoint {model, ema, opt, args};
                                             nothing but plain tensors is unpickled
  a .safetensors file with the same names
  a diffusers folder                         a DiTPipeline, or its transformer; safetensors only, no remote code

The architecture is read from the shapes; all keys must fit, and every missing, extra or mis-shaped one is listed. A
prefix on all keys (module., _orig_mod.) is taken off. Every value is read: NaN and infinite ones are refused.
What the shapes cannot say must be stated:

  model.process=dit      DiT or SiT: both releases have the same names (a training checkpoint says which)
  model.num_heads=16     only for widths that were not published (384: 6, 768: 12, 1024: 16, 1152: 16)

What may be changed on the way in:

  model.num_classes=10   another class count: the label table is made anew (seed=0), the null label's row is kept
  model.kept_blocks=[0,1,5]   drop all other blocks, by original index
  weights=ema            of a training checkpoint: ema (default) or raw
  model.norm_eps, model.frequency_shift   diffusers folders: 1e-5 and 1, as diffusers computes. For weights that were
                         trained with the official code and only converted, give 1e-6 and 0: what they were trained with
  license=cc-by-nc-4.0   licence of the weights, stored with everything that is made from them

Another input size is refused: the positions belong to the size that the model was trained with.

examples:
  entprune-ds import src=DiT-XL-2-256x256.pt out=dit_xl model.process=dit license=cc-by-nc-4.0
  entprune-ds import src=SiT-XL-2-256x256.pt out=sit model.process=sit model.kept_blocks=[0,1,2,4,6,8,27]
  entprune-ds import src=DiT-XL-2-256 out=dit_xl model.frequency_shift=0 model.norm_eps=1e-6
"""
WORDS = ("src", "out", "weights", "seed", "license")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 2 refused)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(HELP, end="")
        return 0
    given = dict(w.partition("=")[::2] for w in words if not w.startswith("model."))
    problems = [
        f"`{w}` is not a setting of import. Known: {', '.join(WORDS)}, model.*." for w in given if w not in WORDS
    ]
    problems += [f"`{w}` is missing: {what}." for w, what in _NEEDED.items() if not given.get(w)]
    if given.get("weights", "ema") not in ("ema", "raw"):
        problems.append(f"`weights` must be ema or raw, got {given['weights']}.")
    if not given.get("seed", "0").isdecimal():
        problems.append(f"`seed` must be a whole number, got {given['seed']}.")
    model: dict[str, object] = {}
    try:
        model = model_settings([w for w in words if w.startswith("model.")])
    except ConfigError as error:
        problems += error.problems
    if problems:
        return refuse(problems)
    from entprune_ds.export import import_model

    out = Path(given["out"])
    try:
        source = import_model(
            Path(given["src"]), out, given=model, weights=given.get("weights"), seed=int(given.get("seed", "0")),
            source_license=given.get("license", ""),
        )  # fmt: skip
    except ValueError as error:
        return refuse([str(error)])
    except OSError as error:
        src = given["src"]
        return refuse([f"cannot read {src}, or cannot write {out}: {error}. Choose another `out` or free space."])
    for note in source.notes:
        print(note)
    m = source.model
    size = f"patch {m.patch_size}, width {m.hidden_size}, {m.num_heads} heads, {m.num_classes} classes"
    print(f"{m.process}, depth {len(m.blocks)} of {m.depth}, {size}, {source.facts['weights']} weights: {out}")
    return 0


_NEEDED = {"src": "name the file or folder to read", "out": "name the folder to write"}


if __name__ == "__main__":
    sys.exit(main())
