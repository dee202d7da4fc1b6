"""`entprune-ds shards`: write a data set as shards that `entprune-ds train` streams."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from entprune_ds import config, logs
from entprune_ds.cli.common import refuse, split_shortcuts, wants_help
from entprune_ds.config_checks import image_problems
from entprune_ds.locks import locked

if TYPE_CHECKING:
    from entprune_ds.data.prepare import Job, Split
    from entprune_ds.data.spawn import Workers

HELP = """\
usage: entprune-ds shards [preset=NAME] source=NAME src=PATH out=DIR [key=value ...] [--dry-run] [--help]

Writes a data set as WebDataset tar files of DIR/train (and DIR/val), each with an index.json of
counts and checksums. An example is KEY.npy, KEY.cls (label) and KEY.json (where it came from).

sources:
  source=folder src=DIR         images of DIR/CLASS/...; the sorted class names are the labels 0, 1, ...
                                (classes.json). With exactly the sub-folders train and val, as in ImageNet,
                                DIR/train/CLASS/... and DIR/val/CLASS/... become the two splits.
  source=csv src=FILE.csv       first line `path,label`; paths are relative to the folder of the file and
                                may not leave it; labels are numbers from 0, or class names
  source=webdataset src=TARS    a folder or a pattern such as 'in/{00..99}.tar' of tars that hold KEY.jpg
                                (.png, .webp) beside KEY.cls, or KEY.json with "label"; order is kept. A KEY
                                that occurs again in its tar is skipped and listed: the first one is used.
                                The same KEY in another tar is another example.
  source=digits                 scikit-learn's 1797 handwritten digits, 8x8, scaled to [-1, 1], 1500 for
                                training and 297 for validation (default)

images: decoded, turned upright (EXIF), RGB, cropped and resized as in ADM (halved by a box filter, then
bicubic, then the centre square), stored as uint8 pixels. Those that cannot be read, or have more than
data.max_pixels, are skipped, counted and listed in skipped.csv; too many of them fail the command.

settings:
  out=DIR                       folder to write (short for data.out=DIR)
  data.image_size=256           side of the stored squares
  data.shard_size=128           examples per tar; more and smaller tars mix better, at least
                                data.num_readers of them; 1000-5000 for millions of images
  data.num_workers=2            processes that work side by side: give the number of cores
  data.val_fraction=0           share of the images for DIR/val, where the source has no folder val
  data.num_classes=null         labels lie below it; null takes what the source has
  data.max_unreadable=0.01         largest share of the images that may be unreadable
  data.max_pixels=100000000     largest width x height; larger images are skipped
  run.seed=0                    decides which images are for validation, and the order
  preset=NAME                   settings to start from: a packaged name, or a .yaml file
  --dry-run                     count, print what would be written, and stop

The same command writes the same bytes, whatever the number of workers. Interrupted or killed, it goes on
after the finished shards when it is started again; on a finished folder it verifies the checksums and
repairs what is damaged and names it; a folder of another data set is left untouched. Two commands cannot write one
folder at the same time: the second is refused.

examples:
  entprune-ds shards preset=digits out=data_digits
  entprune-ds shards source=folder src=/data/imagenet out=/data/in256 data.shard_size=1000 data.num_workers=32
  entprune-ds shards source=csv src=birds/labels.csv out=birds_256 data.val_fraction=0.05
then, for a model of pixels:
  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits data.shards=data_digits/train
or, for a model of latents, first:
  deepspeed --num_gpus 8 --module entprune_ds.cli.encode data.shards=/data/in256 out=/data/in256_latents sample.vae=VAE
"""

SHORTCUTS = {"source": "data.source", "src": "data.src", "out": "data.out"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 too many unreadable images, 2 refused, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(HELP, end="")
        return 0
    try:
        settings = read_settings([word for word in words if word != "--dry-run"])
        return write(settings, dry_run="--dry-run" in words)
    except config.ConfigError as error:
        return refuse(error.problems)
    except ValueError as error:
        return refuse([str(error)])
    except OSError as error:
        message = f"cannot read or write {error.filename or 'the shards'}: {error.strerror or error}."
        return refuse([f"{message} Make room or check the path and the permissions, or choose another `out`."])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def read_settings(words: list[str]) -> config.Config:
    """The settings of the command line, where `out=`, `src=` and `source=` are short for `data.out=` and so on.

    Raises:
        config.ConfigError: listing every problem.
    """
    return config.load_config(split_shortcuts(words, SHORTCUTS), check=_problems)


def _problems(settings: config.Config) -> list[str]:
    data, found = settings.data, image_problems(settings)
    if not data.out:
        found.append("`data.out` is missing: name the folder to write, e.g. out=data_digits.")
    if data.shard_size < 1:
        found.append(f"`data.shard_size` must be above 0, got {data.shard_size}.")
    if data.num_workers < 0:
        found.append(f"`data.num_workers` must be at least 0, got {data.num_workers}.")
    if data.source == "digits" and data.src:
        found.append(f"`data.source` is missing: say what {data.src} is, e.g. source=folder.")
    if data.source == "digits" and data.val_fraction:
        found.append("`data.val_fraction` is not for source=digits, which has its own validation images. Leave it out.")
    if data.source in ("folder", "csv", "webdataset") and not data.src:
        found.append(f"`data.src` is missing: name the {data.source} to read, e.g. src=/data/birds.")
    elif data.source in ("folder", "csv") and not (Path(data.src).is_dir() if data.source == "folder" else
                                                   Path(data.src).is_file()):  # fmt: skip
        what = {"folder": "folder", "csv": "file"}[data.source]
        found.append(f"`data.src`: there is no {what} {data.src}. Correct the path.")
    if data.source in ("folder", "webdataset") and data.out and data.src:
        src, out = Path(os.path.realpath(data.src)), Path(os.path.realpath(data.out))  # resolve() raises for loops
        if out == src or src in out.parents:
            found.append(f"`data.out` must lie outside `data.src` ({data.src}), got {data.out}. Choose another folder.")
    return found


def write(settings: config.Config, dry_run: bool) -> int:
    """Write the shards, or only say what would be written; returns the exit status."""
    if settings.data.source == "digits":
        return _write_digits(settings, dry_run)
    from entprune_ds.data import prepare  # loads torch and webdataset, which --help does not need
    from entprune_ds.data.spawn import Workers

    job = make_job(settings)
    with Workers(settings.data.num_workers) as workers:
        splits = prepare.open_splits(job, workers)
        for name, split in splits.items():
            _describe(job, name, split, prepare.make_plan(job, split, name).num_shards, dry_run)
        if dry_run:
            return 0
        with _locked(job.out, splits):
            failed = [text for name, split in splits.items() if (text := _write_split(job, split, name, workers))]
    refuse(failed)
    return 1 if failed else 0


@contextmanager
def _locked(out: Path, names: Iterable[str]) -> Iterator[None]:
    """Hold the locks of the folders to write."""
    with ExitStack() as held:
        for name in names:
            held.enter_context(locked(out / name, "`out`"))
        yield


def _write_split(job: Job, split: Split, name: str, workers: Workers) -> str:
    """Write one split with a progress line, and say what is there now; returns why it failed, or nothing."""
    from entprune_ds.data.prepare import write_split
    from entprune_ds.data.resumable import TooManySkipped

    with logs.progress(f"shards, {name}", total=len(split.numbers)) as line:
        try:
            index = write_split(
                job,
                split,
                name,
                workers,
                lambda done, skipped: line.update(done, f"{skipped} skipped" if skipped else ""),
            )
        except TooManySkipped as error:
            return str(error)
    print(f"{name}: {index['total']} examples in {len(index['shards'])} shards, {job.out / name}")
    if index["skipped"] or index["ignored"]:
        counts = f"{index['skipped']} images skipped, {index['ignored']} other files ignored"
        print(f"{name}: {counts}; all of them with the reason: {job.out / name / 'skipped.csv'}")
    return ""


def make_job(settings: config.Config) -> Job:
    """The settings of the command as the data room takes them."""
    from entprune_ds.data.prepare import Job

    data = settings.data
    return Job(
        kind=data.source, src=data.src, out=Path(data.out), image_size=data.image_size, max_pixels=data.max_pixels,
        shard_size=data.shard_size, num_classes=data.num_classes, val_fraction=data.val_fraction,
        max_unreadable=data.max_unreadable, seed=settings.run.seed,
    )  # fmt: skip


def _describe(job: Job, name: str, split: Split, num_shards: int, dry_run: bool) -> None:
    """One line per split before the work starts."""
    size = len(split.numbers) * 3 * job.image_size**2 / 1e9
    verb = "would write" if dry_run else "writing"
    text = (
        f"{len(split.numbers)} images of {split.source.num_classes} classes in {num_shards} shards, about {size:.2g} GB"
    )
    print(f"{name}: {verb} {text}, to {job.out / name}", flush=True)
    for what, skips in (("unusable", split.source.unusable), ("not an image", split.source.ignored)):
        if dry_run and skips:
            print(f"{name}: {len(skips)} {what}, the first: {skips[0][0]} ({skips[0][1]})")


def _write_digits(settings: config.Config, dry_run: bool) -> int:
    """The digits, with a progress line, and what is there now."""
    from entprune_ds.data import builtin  # loads torch and webdataset, which --help does not need

    out, size = Path(settings.data.out), settings.data.shard_size
    if dry_run:
        print(f"would write digits to {out}/train and {out}/val, {size} examples per tar")
        return 0
    with _locked(out, ("train", "val")), logs.progress("shards", total=builtin.NUM_IMAGES) as line:
        indices = builtin.write_digits(out, size, settings.run.seed, watch=line.update)
    for split, index in indices.items():
        print(f"{split}: {index['total']} examples in {len(index['shards'])} shards, {out / split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
