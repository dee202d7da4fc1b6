"""Plain values to the typed settings of a Config, and back: YAML, JSON, digests."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from typing import Any

import yaml

from entprune_ds.config_schema import Config
from entprune_ds.redact import redacted_values

FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class ConfigError(ValueError):
    """One error that lists every problem found, one per line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def config_from_dict(values: dict, problems: list[str] | None = None) -> Config:
    """Build a Config from nested plain values, as stored in config.yaml.

    Raises:
        ConfigError: when `problems` is None and a key or a type is wrong.
    """
    found: list[str] = [] if problems is None else problems
    config = _section(Config, values, "", found)
    if problems is None and found:
        raise ConfigError(found)
    return config


def _section(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        problems.append(f"`{path}` must be a group of settings, got {values!r}.")
        return cls()
    chosen = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            problems.append(f"`{name}` is not a setting.{_hint(str(key), hints, path)}")
        elif dataclasses.is_dataclass(hints[key]):
            chosen[key] = _section(hints[key], value, name, problems)
        else:
            try:
                chosen[key] = _convert(value, hints[key])
            except OverflowError:
                problems.append(f"`{name}` is too large a number, got {value!r}.")
            except (TypeError, ValueError):
                problems.append(f"`{name}` must be {_describe(hints[key])}, got {value!r}.")
    return cls(**chosen)


def _hint(key: str, hints: dict[str, Any], path: str) -> str:
    """What may have been meant: a section's setting without its section, a near name, or any of the known ones."""
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    inside = [f"`{name}.{key}`" for name, hint in sections.items() if key in typing.get_type_hints(hint)]
    if inside:
        return f" Did you mean {' or '.join(inside)}?"
    near = difflib.get_close_matches(key, hints, n=1)
    return f" Did you mean `{path + '.' if path else ''}{near[0]}`?" if near else f" Known: {', '.join(hints)}."


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError
        return tuple(_convert(v, args[0]) for v in value)
    if hint is float and isinstance(value, str) and FLOAT.fullmatch(value):
        value = float(value)  # YAML 1.1 takes 1e-3 for text
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is int and isinstance(value, int) and abs(value) >= 2**63:
        raise OverflowError  # neither torch nor a file would hold it
    if isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        many = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{many} ({_describe(args[0])} each)"
    return names.get(hint, str(hint))


def to_dict(config: Any) -> dict:
    """Nested plain values of a config dataclass; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_stored(config: Config) -> dict:
    """Nested plain values that files, logs and W&B may hold: without the secrets of addresses."""
    return redacted_values(to_dict(config))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text, without the secrets of addresses."""
    return yaml.safe_dump(to_stored(config), sort_keys=False)


def digest(values: Any) -> str:
    """SHA-256 of the canonical JSON of plain values; equal on every platform."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
