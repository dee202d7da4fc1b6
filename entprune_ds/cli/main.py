"""`entprune-ds COMMAND ...`: one entry point for the commands that run in a single process."""

from __future__ import annotations

import importlib
import keyword
import sys

from entprune_ds.cli.common import leave

COMMANDS = {
    "shards": "write a data set as WebDataset shards",
    "encode": "turn shards of pixels into latents of a VAE (one process; use the deepspeed launcher for several)",
    "train": "train and prune (one process; use the deepspeed launcher for several)",
    "import": "official DiT and SiT weights, or a diffusers folder, to a model folder",
    "export": "write a run or a model as ordinary weights: ours, official .pt, diffusers",
    "sample": "draw samples of an exported model: PNG folder or npz, and a grid",
    "evaluate": "FID, KID, class accuracy and latency, against a baseline",
    "score": "all criteria on any model without training; recorded decisions made again (--replay)",
    "compare": "criteria side by side: one training per criterion and seed, tables with error bars",
    "report": "build the self-contained report.html of a run",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to a command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: entprune-ds COMMAND [preset=NAME] [key=value ...] [--help]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\nentprune-ds COMMAND --help shows its settings. Multi-process training:")
        print("  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits data.shards=data_digits/train")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: `{words[0]}` is not a command. Choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module = f"{words[0]}_" if keyword.iskeyword(words[0]) else words[0]
    return importlib.import_module(f"entprune_ds.cli.{module}").main(words[1:])


def run() -> None:
    """The installed command."""
    try:
        status = main()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        status = 1
    leave(status)


if __name__ == "__main__":
    run()
