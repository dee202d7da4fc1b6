"""Where shards lie: a local folder, or the URL of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit


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


Place = Path | Url
"""A folder of shards, or a shard."""


def is_url(text: str) -> bool:
    """Whether a text names something on an http(s) server."""
    return text.startswith(("http://", "https://"))


def parse_url(text: str) -> Url:
    """The place that a URL names.

    Raises:
        ValueError: for one without a host, or with a user or a fragment in it.
    """
    parts = urlsplit(text)
    if not parts.hostname or "@" in parts.netloc or parts.fragment:
        raise ValueError("it must be http(s)://HOST/PATH, without user, password or #")
    base, _, query = text.partition("?")
    return Url(base.rstrip("/"), query)
