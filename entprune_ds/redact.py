"""Secrets in addresses, which must not reach logs, error messages or files."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_ADDRESS = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>{any}*@)?(?P<path>{path}*)(?P<query>[?#]{rest}*)?"
_WHOLE = re.compile(_ADDRESS.format(any=r"[^\s/]", path=r"[^?#]", rest=r"[\s\S]"))
_WITHIN = re.compile(_ADDRESS.format(any=r"[^\s/'\"`]", path=r"[^\s?#'\"`]", rest=r"[^\s'\"`]"))
_VALUE = re.compile(r"(?<==)[^&;]+")


def redacted(text: str) -> str:
    """A text whose addresses show neither user and password nor the values of their queries.

    Quotes end an address, unless the whole text is one.
    """
    if _WHOLE.fullmatch(text) and not re.search(r"\s", text):
        return _WHOLE.sub(_hide, text)
    return _WITHIN.sub(_hide, text)


def redacted_values(values: Any) -> Any:
    """Nested plain values with every text redacted."""
    if isinstance(values, dict):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redacted_values(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


def is_redacted(text: str) -> bool:
    """Whether an address in a text has lost a secret."""
    return any(mark in text for mark in (f"={HIDDEN}", f"://{HIDDEN}@", f"?{HIDDEN}", f"#{HIDDEN}"))


def _hide(found: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if found["user"] else ""
    query = found["query"] or ""
    hidden = _VALUE.sub(HIDDEN, query)
    if query and "=" not in query:
        hidden = query[0] + (HIDDEN if query[1:] else "")
    return found["scheme"] + user + found["path"] + hidden
