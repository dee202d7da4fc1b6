"""YAML without its traps: a key given twice is an error, and 010 is text rather than the octal number 8."""

from __future__ import annotations

import re
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what a reader of the file would not expect."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node of the text; not a reference to another one, of which a few lines could mean billions."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"`*{event.anchor}` refers to another part: write it out", event.start_mark
            )
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, objects of other kinds, a reference, or a key that is given twice, naming it and its
            line.
    """
    try:
        loader = PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # `!!timestamp x`, [[[[...
        raise yaml.YAMLError(f"it cannot be read ({type(error).__name__}: {error})") from error


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
