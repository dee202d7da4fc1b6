"""`entprune-ds shards`: write a data set as shards that `entprune-ds train` streams."""

from __future__ import annotations

import sys
from pathlib import Path

from entprune_ds import config, logs

HELP = """\
usage: entprune-ds shards [preset=NAME] out=DIR [source=digits] [key=value ...] [--dry-run] [--help]

Writes a data set as WebDataset tar files of DIR/train and DIR/val, each with an index.json
of counts and checksums. An example is KEY.npy (float32 C,H,W), KEY.cls (label), KEY.json.

  out=DIR               folder to write (short for data.out=DIR)
  source=NAME           data set; digits = scikit-learn's 1797 handwritten digits, 8x8,
                        scaled to [-1, 1], 1500 for training and 297 for validation (default)
  data.shard_size=128   examples per tar; more and smaller tars mix better
  run.seed=0            decides which images are for validation
  preset=NAME           settings to start from: a packaged name, or a .yaml file
  --dry-run             print what would be written, and stop

The same command writes the same bytes. On a finished folder it only verifies the checksums,
on a damaged one it repairs, and a folder of another data set is left untouched.

examples:
  entprune-ds shards preset=digits out=data_digits
  entprune-ds shards out=data_digits data.shard_size=32
then:
  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits data.shards=data_digits/train
"""

SOURCES = ("digits",)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    try:
        settings = read_settings([word for word in words if word != "--dry-run"])
        if "--dry-run" in words:
            out, size = settings.data.out, settings.data.shard_size
            print(f"would write digits to {out}/train and {out}/val, {size} examples per tar")
            return 0
        write(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        message = f"cannot write {error.filename or 'the shards'}: {error.strerror}."
        print(f"{message} Make room or check the permissions, or choose another `out`.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def read_settings(words: list[str]) -> config.Config:
    """The settings of the command line, where `out=` is short for `data.out=`.

    Raises:
        config.ConfigError: listing every problem.
    """
    sources = [word.partition("=")[2] for word in words if word.startswith("source=")]
    known = ", ".join(SOURCES)
    problems = [f"`source` must be one of {known}, got {name}." for name in sources if name not in SOURCES]
    rest = [f"data.{word}" if word.startswith("out=") else word for word in words if not word.startswith("source=")]
    settings = config.Config()
    try:
        settings = config.load_config(rest, check=_problems)
    except config.ConfigError as error:
        problems += error.problems
    if problems:
        raise config.ConfigError(problems)
    return settings


def _problems(settings: config.Config) -> list[str]:
    found = []
    if not settings.data.out:
        found.append("`data.out` is missing: name the folder to write, e.g. out=data_digits.")
    if settings.data.shard_size < 1:
        found.append(f"`data.shard_size` must be above 0, got {settings.data.shard_size}.")
    return found


def write(settings: config.Config) -> None:
    """Write the digits with a progress line, and say what is there now."""
    from entprune_ds.data import builtin  # loads torch and webdataset, which --help does not need

    out = Path(settings.data.out)
    with logs.progress("shards", total=builtin.NUM_IMAGES) as line:
        indices = builtin.write_digits(out, settings.data.shard_size, settings.run.seed, watch=line.update)
    for split, index in indices.items():
        print(f"{split}: {index['total']} examples in {len(index['shards'])} shards, {out / split}")


if __name__ == "__main__":
    sys.exit(main())
