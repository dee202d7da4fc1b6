"""Which data set real images are of, as far as it is known, and whether it can be that of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entprune_ds.cli.encode import class_names
from entprune_ds.config import Config, digest
from entprune_ds.data.index import Index, load_index, resolve


def data_of(index: Index) -> dict[str, Any]:
    """The number of classes of shards and, where the classes have names, a digest of these; as plain values."""
    names = class_names(index)
    return {"num_classes": index.num_classes} | ({"class_names": digest(list(names))[:16]} if names else {})


def model_problem(about: dict[str, Any], num_classes: int, weights: Path) -> str | None:
    """Why samples of a model, which are of all its classes, cannot be compared with a reference.

    Args:
        about: what the reference says of itself; `num_classes` where it was made from shards.
        num_classes: of the model; 1 and no classes at all are the same.
        weights: the model.
    """
    held = about.get("num_classes", 1)
    if 1 in (held, num_classes) or held == num_classes:
        return None
    message = f"the real images ({about.get('images')}) are of {held} classes, {weights} draws {num_classes}. "
    return message + "Give the reference of the model's data set."


def shards_problem(about: dict[str, Any], config: Config) -> str | None:
    """Why statistics are not of the data set that `data.shards` names; None also where either does not say it."""
    shards = known_data(config)
    held, here = about.get("num_classes", 1), shards.get("num_classes", 1)
    names = about.get("class_names"), shards.get("class_names")
    if 1 not in (held, here) and held != here:
        why = f"images of {held} classes, but `data.shards` ({config.data.shards}) has {here}"
    elif None not in names and names[0] != names[1]:
        why = f"but the classes of `data.shards` ({config.data.shards}) have other names"
    else:
        return None
    message = f"`evaluate.reference`: {config.evaluate.reference} was made from {about.get('images')}, {why}. "
    return message + "Give the reference of this data set, or set data.shards to the one that it was made from."


def known_data(config: Config) -> dict[str, Any]:
    """`data_of` the shards of the settings; nothing where they are not on a disk here, or no longer there."""
    try:
        folder, _ = resolve(config.data.shards)
        return data_of(load_index(config.data.shards)) if isinstance(folder, Path) else {}
    except (ValueError, OSError):
        return {}
