"""An object that a user's own Python file defines; its code runs here, so only a path given by the user comes here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def object_of_file(path: Path, name: str, kind: type[T], setting: str, example: str) -> T:
    """Object `name` of a Python file.

    Args:
        path: ends in .py.
        name: what the file must define.
        kind: of what type it must be.
        setting: that named the file, for messages.
        example: where one is shown, for messages.

    Raises:
        ValueError: when the file cannot be run, or defines no such object.
    """
    spec = importlib.util.spec_from_file_location(f"user_{name.lower()}_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"`{setting}`: {path} cannot be run ({why}). Correct it.") from error
    found = vars(module).get(name)
    if not isinstance(found, kind):
        message = f"`{setting}`: {path} must define {name} = {kind.__name__}(...), got {found!r}. "
        raise ValueError(message + f"{example} one.")
    return found
