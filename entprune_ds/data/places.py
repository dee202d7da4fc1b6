"""Where shards lie: in a local folder, on a server, or behind a shell command that prints them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote as quote_word
from urllib.parse import quote, urlsplit

from entprune_ds.redact import redacted


@dataclass(frozen=True)
class Url:
    """A folder or file on an http(s) server. `url / name` is a file in it, with the same query (a token, say)."""

    base: str
    """Everything before the `?`, without a slash at the end."""
    query: str = ""

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.base}/{quote(name)}", self.query)  # a `%` or `?` in a file name is a letter, too

    def __str__(self) -> str:
        return self.base  # messages and logs must not show a token

    @property
    def address(self) -> str:
        """What is sent to the server; blanks and other letters that a URL may not hold are quoted."""
        base, query = (quote(part, safe="%:/?#[]@!$&'()*+,;=~") for part in (self.base, self.query))
        return f"{base}?{query}" if query else base

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.base.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        return Url(self.base.rpartition("/")[0], self.query)


@dataclass(frozen=True)
class Pipe:
    """A folder or file that a shell command prints, such as `aws s3 cp s3://bucket/in-000.tar -`."""

    before: str
    """The command up to the path."""
    path: str
    after: str

    def __truediv__(self, name: str) -> Pipe:
        return Pipe(self.before, f"{self.path}/{quote_word(name)}", self.after)

    def __str__(self) -> str:
        return redacted(f"pipe:{self.command}")

    @property
    def command(self) -> str:
        """What the shell runs."""
        return f"{self.before}{self.path}{self.after}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Pipe:
        """The folder that holds it: the same command with another file name prints what lies beside it."""
        return Pipe(self.before, self.path.rpartition("/")[0], self.after)


Place = Path | Url | Pipe
"""A folder of shards, or a shard."""


def is_url(text: str) -> bool:
    """Whether a text names something on an http(s) server."""
    return text.startswith(("http://", "https://"))


def parse_url(text: str) -> Url:
    """The place that a URL names.

    Raises:
        ValueError: for one without a host, or with a user or a fragment in it.
    """
    try:
        parts = urlsplit(text)
        plain = parts.hostname and "@" not in parts.netloc and not parts.fragment
    except ValueError:  # its message may hold a password
        plain = False
    if not plain:
        raise ValueError("it must be http(s)://HOST/PATH, without user, password or #; a token goes after a ?")
    base, _, query = text.partition("?")
    return Url(base.rstrip("/"), query)


def parse_pipe(text: str) -> Pipe:
    """The place that `pipe:COMMAND` names; the command must hold one path, with a folder, of a tar file.

    Raises:
        ValueError: when it does not.
    """
    command = text.removeprefix("pipe:").strip()
    found = list(re.finditer(r"[^\s'\"|&;<>()$`\\]+/[A-Za-z0-9._-]+\.tar(?=\s|$)", command))
    if len(found) != 1:
        raise ValueError("the command must hold exactly one path such as s3://bucket/in-{000..127}.tar, without quotes")
    start, end = found[0].span()
    return Pipe(command[:start], found[0].group(), command[end:])


def from_text(text: str) -> Place:
    """The place that `to_text` wrote down."""
    kind, _, rest = text.partition(" ")
    if kind == "pipe":
        before, path, after = rest.split("\0")
        return Pipe(before, path, after)
    return parse_url(rest) if kind == "url" else Path(rest)


def to_text(place: Place) -> str:
    """A place as a text, with all that is needed to read it; not for logs."""
    if isinstance(place, Pipe):
        return "pipe " + "\0".join((place.before, place.path, place.after))
    return f"url {place.address}" if isinstance(place, Url) else f"path {place}"
