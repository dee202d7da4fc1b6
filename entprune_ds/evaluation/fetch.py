"""A file of weights that many processes of a node need: downloaded once, by whoever comes first."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from cleanfid.downloads_helper import inception_url
from cleanfid.inception_pytorch import FID_WEIGHTS_URL

from entprune_ds.atomic import replacing

CONNECT_SECONDS = 10.0
URLS = {"clean": inception_url, "legacy_tensorflow": inception_url, "legacy_pytorch": FID_WEIGHTS_URL}
"""What clean-fid downloads for each of its modes."""


def inception_file(path: str, mode: str) -> Path:
    """The weights of a mode: a given file, or the one in clean-fid's cache (/tmp), downloaded if it is not there.

    Raises:
        ValueError: when the file is missing and cannot be downloaded.
    """
    if path:
        if not Path(path).is_file():
            raise ValueError(f"`evaluate.inception`: {path} does not exist. {_remedy(mode)}")
        return Path(path)
    target = Path(tempfile.gettempdir()) / URLS[mode].rsplit("/", 1)[1]
    try:
        return fetch(URLS[mode], target)
    except OSError as error:
        raise ValueError(
            f"`evaluate.inception`: the weights are not in {target}, and {error}. {_remedy(mode)}"
        ) from error


def fetch(url: str, target: Path, timeout: float = CONNECT_SECONDS) -> Path:
    """Download a file unless it is there; of the processes of a node that ask at a time one tries, the others wait.

    They wait for a file lock, not in a collective, so a slow network times nothing out. When it fails, those that were
    waiting fail with the same message at once.

    Raises:
        OSError: when it cannot be downloaded or written.
    """
    if target.is_file():
        return target
    since = time.monotonic()
    with open(target.with_name(f"{target.name}.lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return target
        lock.seek(0)
        failed = _read(lock.read())
        if failed.get("at", 0.0) >= since:  # monotonic time is one for all processes of a node
            raise OSError(failed["why"])
        try:
            with replacing(target) as temporary:
                _download(url, temporary, timeout)
        except (OSError, urllib.error.URLError) as error:
            why = f"{url} cannot be downloaded ({getattr(error, 'reason', None) or error})"
            lock.truncate(0)
            lock.write(json.dumps({"at": time.monotonic(), "why": why}))
            lock.flush()
            raise OSError(why) from error
    return target


def _download(url: str, path: Path, timeout: float) -> None:
    with urllib.request.urlopen(url, timeout=timeout) as reply, open(path, "wb") as file:
        shutil.copyfileobj(reply, file)
        length = int(reply.headers.get("Content-Length") or file.tell())
        if file.tell() != length:
            raise OSError(f"only {file.tell()} of {length} bytes came")


def _read(text: str) -> dict:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _remedy(mode: str) -> str:
    return f"Download {URLS[mode]} on a machine with a network, and give it as evaluate.inception=FILE."
