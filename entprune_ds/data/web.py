"""Files of an http(s) server, read from front to end through broken connections and busy servers.

A read that fails is repeated with exponential back-off, from the byte where it stopped (HTTP Range; where the server
does not know Range, what was read already is read again and thrown away). Only http and https are opened, also after a
redirection; proxies come from the environment as usual.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from typing import Any

from entprune_ds.data.latents import ShardError
from entprune_ds.data.places import Url
from entprune_ds.redact import redacted

TIMEOUT = 30.0
"""Seconds without an answer after which an attempt has failed."""
ATTEMPTS = 7
"""Attempts in a row without a single byte before it is an error."""
BACKOFF = 0.5
"""Seconds before the second attempt; doubled before every further one."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be better in a moment; any other error status is final."""
CHUNK = 1 << 18
FAILURES = (OSError, http.client.HTTPException)
"""What a connection can raise; URLError and time-outs are OSErrors."""


def _opener() -> urllib.request.OpenerDirector:
    """http and https only: the standard opener would also follow a redirection to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


class WebFile:
    """A remote file of known size, or (size None) of the size that the server says.

    Raises:
        ShardError: from every method, when the file cannot be read or is not of that size.
    """

    def __init__(self, url: Url, size: int | None = None):
        self.url, self.size, self.offset = url, size, 0
        self.opener = _opener()
        self.response: Any = None

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        parts: list[bytes] = []
        failures = 0
        while size > 0 and (self.size is None or self.offset < self.size):
            try:
                if self.response is None:
                    self._connect()
                    continue  # now the size is known
                data = self.response.read(min(size, CHUNK))
                if not data:
                    raise ConnectionError(f"the connection ended after {self.offset} of {self.size} bytes")
            except FAILURES as error:
                failures += 1
                self._wait_or_give_up(error, failures)
                continue
            failures = 0
            parts.append(data)
            self.offset += len(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Pass over bytes; they are read, so that a checksum over the file sees them."""
        while size > 0 and (data := self.read(min(size, CHUNK))):
            size -= len(data)

    def read_all(self) -> bytes:
        """The rest of the file."""
        parts = []
        while self.size is None or self.offset < self.size:
            parts.append(self.read(CHUNK))
        return b"".join(parts)

    def close(self) -> None:
        """End the connection; the next read makes another."""
        if self.response is not None:
            self.response.close()
            self.response = None

    def _connect(self) -> None:
        """Ask for the file from `offset` on."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "entprune_ds"}
        if self.offset:
            headers["Range"] = f"bytes={self.offset}-"
        response = self.opener.open(urllib.request.Request(self.url.address, headers=headers), timeout=TIMEOUT)
        self.response = response
        partial = response.status == 206
        stated = (response.headers["Content-Range"] or "").rpartition("/")[2] if partial else None
        total = stated if partial else response.headers["Content-Length"]
        if total is not None and total.isdigit():
            self._check_size(int(total))
        elif self.size is None:
            raise ShardError(f"{self.url} cannot be read: the server does not say its size. Copy it to a local path.")
        if partial and not (response.headers["Content-Range"] or "").startswith(f"bytes {self.offset}-"):
            raise ShardError(f"{self.url} cannot be read: the server answered with another range than asked for.")
        behind = 0 if partial else self.offset
        while behind > 0:
            data = response.read(min(behind, CHUNK))
            if not data:
                raise ConnectionError("the connection ended before the place where it broke last time")
            behind -= len(data)

    def _check_size(self, total: int) -> None:
        if self.size is None:
            self.size = total
        if total != self.size:
            message = f"{self.url} is truncated or changed: {total} bytes, the index says {self.size}."
            raise ShardError(f"{message} Copy it to the server again.")

    def _wait_or_give_up(self, error: Exception, failures: int) -> None:
        self.close()
        shown = redacted(str(error))  # that of a redirection holds its target
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        if status is not None and status not in TRANSIENT:
            raise ShardError(f"{self.url} cannot be read: {shown}. Check the URL and the permissions.") from error
        if failures >= ATTEMPTS:
            message = f"{self.url} cannot be read: {shown} ({type(error).__name__}), {failures} attempts in a row."
            raise ShardError(f"{message} Check the server and the network; the same command resumes.") from error
        time.sleep(BACKOFF * 2 ** (failures - 1))
