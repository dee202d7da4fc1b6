"""Secrets in addresses and in shell commands that print shards; they must not reach logs, error messages or files."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_ADDRESS = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>{any}*@)?(?P<path>{path}*)(?P<query>[?#]{rest}*)?"
_WHOLE = re.compile(_ADDRESS.format(any=r"[^\s/]", path=r"[^?#]", rest=r"[\s\S]"))
_WITHIN = re.compile(_ADDRESS.format(any=r"[^\s/'\"`]", path=r"[^\s?#'\"`]", rest=r"[^\s'\"`]"))
_VALUE = re.compile(r"(?<==)[^&;]+")

_WORD = r"""(?:\$\([^()]*\)|'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\|;&])+"""
_HEADER = re.compile(  # the name, behind a quote that may be escaped, as in a repr, up to the same quote
    r"""(?P<option>(?<!\S)(?:-[A-Za-z]*H|--(?:proxy-)?header)[\s=]*\$?)(?P<quote>\\?['"])?(?P<name>[\w-]+:\s*)"""
    rf"""(?P<value>(?(quote)(?:(?!(?P=quote))(?:\\.|[^\\]))+|{_WORD}))"""
)
_LOGIN = re.compile(rf"(?P<option>(?<!\S)(?:-[A-GI-Za-z]*[uU]|--(?:proxy-)?user)[\s=]*)(?P<value>{_WORD})")
_COOKIE = re.compile(rf"(?P<option>(?<!\S)-[A-GI-Za-z]*b\s*)(?P<value>(?=\S*=){_WORD})")
_PASSWORD = re.compile(rf"(?P<option>\bsshpass\s+-p\s*|(?<!\S)-pass\s+pass:)(?P<value>{_WORD})")
_AT_HOST = re.compile(r"(?P<option>(?<![^\s'\"=]))(?P<value>[^\s'\"@/:=]+:[^\s'\"@]+)(?=@)")
_TELLING = (
    r"(?:token|secret|passw(?:or)?d|passphrase|(?<![A-Za-z])pass|bearer|cookie|(?:account|api|access|secret)[_-]?key)"
)
_NAMED = re.compile(
    rf"(?P<option>(?<![\w&?/.-])(?:[\w-]*{_TELLING}=|--[\w-]*{_TELLING}\s+))(?P<value>{_WORD})", re.IGNORECASE
)
_VARIABLES = re.compile(
    r"""['"]?(?:(?:Bearer|Basic|Token)\s+)?(?::?\$(?:\w+|\{\w+\}|\([^()]*\)))+['"]?""", re.IGNORECASE
)
_PLAIN_HEADERS = ("accept", "accept-encoding", "content-type", "host", "range", "referer", "user-agent")


def redacted(text: str) -> str:
    """A text whose addresses show neither user and password nor the values of their queries.

    Quotes end an address, unless the whole text is one. What follows `pipe:` shows no values of headers, logins,
    and options and variables such as --password and TOKEN=; `$NAME` and `$(cat FILE)` hold no secret and stay.
    """
    if _WHOLE.fullmatch(text) and not re.search(r"\s", text):
        return _WHOLE.sub(_hide, text)
    before, pipe, command = _WITHIN.sub(_hide, text).partition("pipe:")
    for pattern in (_HEADER, _LOGIN, _COOKIE, _PASSWORD, _AT_HOST, _NAMED):
        command = pattern.sub(_hide_value, command)
    return before + pipe + command


def redacted_values(values: Any) -> Any:
    """Nested plain values with every text redacted."""
    if isinstance(values, dict):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redacted_values(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


def is_redacted(text: str) -> bool:
    """Whether an address or a command in a text has lost a secret."""
    marks = (f"={HIDDEN}", f"://{HIDDEN}@", f"?{HIDDEN}", f"#{HIDDEN}")
    return any(mark in text for mark in marks) or HIDDEN in text.partition("pipe:")[2]


def _hide(found: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if found["user"] else ""
    query = found["query"] or ""
    hidden = _VALUE.sub(HIDDEN, query)
    if query and "=" not in query:
        hidden = query[0] + (HIDDEN if query[1:] else "")
    return found["scheme"] + user + found["path"] + hidden


def _hide_value(found: re.Match[str]) -> str:
    parts, value = found.groupdict(), found["value"]
    name, quote = parts.get("name") or "", parts.get("quote") or ""
    plain = name.partition(":")[0].lower() in _PLAIN_HEADERS or _VARIABLES.fullmatch(value)
    if plain or (found.re is _LOGIN and ":" not in value):  # a user alone: the password is asked for
        return found[0]
    return found["option"] + quote + name + HIDDEN
