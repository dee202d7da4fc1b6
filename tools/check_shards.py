"""Check folders of shards by reading everything: checksums, counts, shapes, labels; and show what is in them.

    python tools/check_shards.py data/in256/train data/birds                 folders of shards, or of train/ and val/
    python tools/check_shards.py data/in256_latents --sheet s.png --vae VAE  with a picture, moments decoded by a VAE
    python tools/check_shards.py data/in256 --json                           one line for scripts

The exit status is 1 when something is damaged or missing, and every problem is listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from entprune_ds.data.index import Index, check_shards, load_index
from entprune_ds.data.latents import Entry, ShardError
from entprune_ds.data.reader import Damage, scan_shard
from entprune_ds.logs import ProgressLine, progress

COLUMNS, SIDE, TEXT = 10, 64, 14
"""Tiles per row, least side of a tile and height of a line of text, in pixels."""


@dataclass
class Found:
    """What one folder holds."""

    index: Index
    labels: np.ndarray
    """Examples per class."""
    problems: list[str]
    keys: set[str] = field(default_factory=set)
    shown: dict[int, list[Entry]] = field(default_factory=dict)
    """The first examples of every class, for the contact sheet."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folder of shards, brace pattern of tars, or parent of train/, val/")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first folder to this PNG file")
    parser.add_argument("--examples", type=int, default=50, help="pictures on the sheet, as many of each class (50)")
    parser.add_argument("--vae", default="", help="folder or hub name of a diffusers AutoencoderKL, to decode moments")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    founds, problems = check_all(arguments.folders, arguments.examples if arguments.sheet else 0)
    if arguments.sheet and founds:
        try:
            write_sheet(founds[0], arguments.sheet, arguments.examples, arguments.vae)
        except (ValueError, OSError) as error:
            problems.append(f"no contact sheet: {error}")
    seconds = round(time.perf_counter() - start, 3)
    if arguments.json:
        reports = [report(found) for found in founds]
        print(json.dumps({"ok": not problems, "seconds": seconds, "folders": reports, "problems": problems}))
    else:
        text = [describe(found) for found in founds] + [f"damaged: {problem}" for problem in problems]
        print("\n".join(text if problems else [*text, f"no problems, {seconds:.1f} s"]))
    return 1 if problems else 0


def check_all(specs: list[str], pictures: int) -> tuple[list[Found], list[str]]:
    """What the folders hold, and every problem."""
    founds: list[Found] = []
    problems: list[str] = []
    for spec in (inner for outer in specs for inner in expand(outer)):
        try:
            found = check(load_index(spec), pictures)
        except (ShardError, OSError) as error:
            problems.append(str(error))
        else:
            founds.append(found)
            problems += found.problems
    return founds, problems


def expand(spec: str) -> list[str]:
    """A folder without an index stands for its sub-folders train and val that have one."""
    inner = [str(Path(spec, name)) for name in ("train", "val") if Path(spec, name, "index.json").is_file()]
    return inner if inner and not Path(spec, "index.json").is_file() else [spec]


def check(index: Index, pictures: int) -> Found:
    """Read every example of a folder."""
    found = Found(index, np.zeros(index.num_classes, np.int64), check_shards(index, checksums=True))
    per_class = -(-pictures // index.num_classes)
    with progress(f"check {index.folder}", total=index.total) as line:
        for shard in index.shards:
            try:
                for entry in scan_shard(index, shard):
                    _count(found, entry, per_class, line)
            except (ShardError, OSError) as error:
                if str(error) not in found.problems:
                    found.problems.append(str(error))
    if index.label_histogram is not None and not found.problems and tuple(found.labels) != index.label_histogram:
        found.problems.append(f"{index.folder}: the labels are not as often there as its index says.")
    return found


def _count(found: Found, entry: Entry | Damage, per_class: int, line: ProgressLine) -> None:
    if isinstance(entry, Damage):
        if entry.text not in found.problems:
            found.problems.append(entry.text)
        return
    key, array, label = entry
    if key in found.keys:
        found.problems.append(f"{found.index.folder}: example {key} is there twice.")
    found.keys.add(key)
    found.labels[label] += 1
    if len(found.shown.setdefault(label, [])) < per_class:
        found.shown[label].append((key, array.copy(), label))
    line.update(int(found.labels.sum()))


def report(found: Found) -> dict[str, Any]:
    """Plain values of one folder."""
    index = found.index
    return {
        "folder": str(index.folder), "kind": index.kind, "shape": list(index.shape), "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards), "examples": int(found.labels.sum()),
        "expected": index.total, "num_classes": index.num_classes, "label_histogram": found.labels.tolist(),
        "problems": len(found.problems),
    }  # fmt: skip


def describe(found: Found) -> str:
    """The report of one folder as text."""
    values, labels = report(found), found.labels
    size = "x".join(map(str, values["shape"]))
    most = int(labels.max())
    lines = [
        f"{values['folder']}: {values['examples']} of {values['expected']} {values['kind']} {size} in "
        f"{values['shards']} shards, {values['bytes'] / 1e6:.1f} MB",
        f"  {values['num_classes']} classes, {int((labels == 0).sum())} of them empty; "
        f"{int(labels.min())} to {most} examples per class, median {np.median(labels):g}",
    ]
    for label in sorted(np.argsort(-labels, kind="stable")[:20]):
        lines.append(f"  {label:6d} {labels[label]:8d} {'#' * round(40 * labels[label] / max(most, 1))}")
    return "\n".join(lines + (["  (the 20 largest classes)"] if len(labels) > 20 else []))


# ---------------------------------------------------------------- contact sheet


def write_sheet(found: Found, path: Path, count: int, vae: str) -> None:
    """Pictures of the first examples of every class, with their labels and a line that says what is shown."""
    rounds = zip_longest_lists([found.shown[label] for label in sorted(found.shown)])
    chosen = sorted(rounds[:count], key=lambda entry: entry[2])
    if not chosen:
        raise ValueError(f"{found.index.folder} has no readable example.")
    images, how = pictures(np.stack([array for _, array, _ in chosen]), found.index.kind, vae)
    enlarge = max(1, -(-SIDE // images.shape[1]))
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    height, width = images.shape[1] + TEXT, images.shape[2] + 2
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height + TEXT), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, (_, _, label)) in enumerate(zip(images, chosen, strict=True)):
        x, y = i % COLUMNS * width, i // COLUMNS * height
        sheet.paste(Image.fromarray(image), (x, y))
        draw.text((x, y + height - TEXT), str(label), fill="black")
    draw.text((0, rows * height), f"{found.index.kind}: {how}; number = label", fill="black")
    sheet.save(path, format="PNG")


def zip_longest_lists(lists: list[list[Entry]]) -> list[Entry]:
    """The first of each list, then the second of each, ..."""
    longest = max((len(entries) for entries in lists), default=0)
    return [entries[i] for i in range(longest) for entries in lists if i < len(entries)]


def pictures(arrays: np.ndarray, kind: str, vae: str) -> tuple[np.ndarray, str]:
    """Examples as uint8 (N,H,W,3) to look at, and how they were made."""
    if kind == "pixels":
        return as_rgb(arrays), "as stored"
    if kind == "moments":
        arrays = arrays[:, 0, : arrays.shape[2] // 2]  # the mean of the image itself
        if vae:
            from entprune_ds.interop.vae import load_vae

            decoder = load_vae(vae)
            decoded = decoder.decode(torch.from_numpy(arrays) * decoder.scaling_factor).numpy()
            pixels = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            return as_rgb(pixels), f"means decoded by {decoder.name}"
    shown = arrays[:, :3] if arrays.shape[1] >= 3 else arrays[:, :1]
    low, high = shown.min(), shown.max()
    gray = ((shown - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    channels = f"first {shown.shape[1]} channel(s) of the {'means' if kind == 'moments' else 'latents'}"
    return as_rgb(gray), f"{channels}, {low:.3g} dark to {high:.3g} bright, not decoded"


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N,C,H,W), C = 1, 3 or more -> (N,H,W,3)."""
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].repeat(3, axis=1)
    return np.ascontiguousarray(shown.transpose(0, 2, 3, 1))


if __name__ == "__main__":
    sys.exit(main())
