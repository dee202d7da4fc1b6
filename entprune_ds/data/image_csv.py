"""Images that a CSV file lists; everything that is wrong with it is told with its line."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from entprune_ds.data.image_sources import MAX_CLASSES, Item, Source, SourceError, first_lines

Row = tuple[str, str, int]
"""(path, label, line)."""


def csv_source(path: Path, num_classes: int | None = None) -> Source:
    """Images named by a CSV file with the columns `path` and `label`; paths are relative to the folder of the file.

    Labels are whole numbers from 0, or class names (then sorted names give the labels). Other columns are not used. A
    file that is missing is found out when it is read.

    Args:
        path: UTF-8 CSV file whose first line names its columns.
        num_classes: labels lie below it; None means the largest label + 1.

    Raises:
        SourceError: listing the lines that cannot be a row of the table, with a path that leaves the folder, or with a
            bad label.
    """
    rows, problems = _rows(path)
    if not rows and not problems:
        raise SourceError(f"{path} lists no images. Write one line per image below the header.")
    if any(re.match(r"[-+\d]", label) for _, label, _ in rows):
        labels, count, bad = _number_labels(rows, num_classes)
        names = None
    else:
        names = tuple(sorted({label for _, label, _ in rows}))
        labels, count, bad = {name: i for i, name in enumerate(names)}, len(names), []
        if num_classes is not None and num_classes < count:
            problems.append(f"{path} has {count} classes, `data.num_classes` is {num_classes}. Raise it.")
    problems += [f"{path}, line {line}: {why}" for line, why in bad]
    if problems:
        raise SourceError(first_lines(problems))
    return Source(
        path.parent, tuple(Item(p, labels[label]) for p, label, _ in rows), max(count, num_classes or 0), names
    )


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """The usable rows, and what is wrong with the others."""
    rows: list[Row] = []
    problems: list[str] = []
    columns: list[str] = []
    for line, cells in _records(path):
        if not columns:
            columns = cells
            if why := _header_problem(cells):
                raise SourceError(f"{path}, line {line}: {why}")
            continue
        row = dict(zip(columns, cells, strict=False))
        name, label = row.get("path", ""), row.get("label", "").strip()
        if len(cells) > len(columns):
            why = f"it has {len(cells)} cells, the header names {len(columns)}. Put a text with a comma in quotes"
        else:
            why = _path_problem(path.parent, name) or ("" if label else "the label is missing")
        if why:
            problems.append(f"{path}, line {line}: {why}.")
        else:
            rows.append((name, label, line))
    return rows, problems


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every record; empty lines are passed over.

    Raises:
        SourceError: when the file is not UTF-8, or a quote does not close in its line: it would swallow rows.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{path}, line {line}: is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                end = reader.line_num
                raise SourceError(f"{path}, line {line}: a quote opens that closes in line {end} only. {QUOTES}")
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}, line {line}: is not CSV, or a quote does not close ({error}). {QUOTES}") from error


QUOTES = "Close the quote in its line, write a quote within a text twice, and take line breaks out of texts."


def _header_problem(columns: list[str]) -> str:
    """What is wrong with the first line; empty when it names the columns."""
    if {"path", "label"} <= set(columns):
        twice = [name for name in ("path", "label") if columns.count(name) > 1]
        return f"the column {twice[0]} is named twice. Rename one of them." if twice else ""
    first = ",".join(columns)[:100]
    separator = next((s for s in (";", "\t", "|") if s in first), "")
    if len(columns) == 1 and separator:
        return f"the columns are separated by {separator!r}, not by commas ({first!r}). Save the file with commas."
    return f"it must name the columns path and label, got {first!r}. Add `path,label` as the first line."


def _number_labels(
    rows: list[tuple[str, str, int]], num_classes: int | None
) -> tuple[dict[str, int], int, list[tuple[int, str]]]:
    """({text: label}, classes, [(line, problem)]) of labels that are meant as numbers."""
    limit, labels, bad = num_classes or MAX_CLASSES, {}, []
    for _, text, line in rows:
        number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
        if 0 <= number < limit:
            labels[text] = number
        else:
            hint = "Correct it, or raise `data.num_classes`." if num_classes else "Correct it."
            bad.append((line, f"the label must be a whole number from 0 to {limit - 1}, got {text!r}. {hint}"))
    return labels, max(labels.values(), default=0) + 1, bad


def _path_problem(root: Path, text: str) -> str:
    """Why a path of a CSV file may not be used; empty when it may."""
    parts = PurePosixPath(text).parts
    if not text or "\0" in text:
        return "the path is missing"
    if text.startswith(("/", "\\", "~")) or ".." in parts or re.match(r"[A-Za-z]:", text) or "..\\" in text:
        return f"the path {text!r} must be relative and stay below {root}"
    real, top = _real_folder(root / Path(text).parent), _real_folder(root)
    target = os.path.join(real, Path(text).name)
    target = os.path.realpath(target) if os.path.islink(target) else target
    if os.path.commonpath([top, target]) != top:
        return f"the path {text!r} leaves {root} through a link"
    return ""


@lru_cache(maxsize=4096)  # a data set has many files in few folders, and each folder costs several system calls
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)
