"""YAML without its traps: a key given twice is an error, and 010 is text rather than the octal number 8."""

from __future__ import annotations

import re
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what a reader of the file would not expect."""


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, objects of other kinds, or a key that is given twice, naming it and its line.
    """
    loader = PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _mapping(loader: PlainLoader, node: yaml.MappingNode) -> dict:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"`{twice[0]}` is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: PlainLoader, node: yaml.ScalarNode) -> int | str:
    return int(node.value) if re.fullmatch(r"[+-]?(0|[1-9]\d*)", node.value) else node.value


PlainLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
