"""What a file is that should be weights and is not: a download that went wrong, or another format under their name."""

from __future__ import annotations

from pathlib import Path

SAVE_AGAIN = "python -c \"import torch; torch.save(torch.load('{path}', weights_only=True), '{path}')\""
OLD_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""torch.serialization.MAGIC_NUMBER as the pickle that begins a file of torch before 1.6."""


def mistaken_for(path: Path) -> str | None:
    """What the file looks like and what to do, as a sentence; None when its first bytes say nothing.

    Args:
        path: a file that should be a .pt or .safetensors file.
    """
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return f"{path} is empty (0 bytes): a download or copy has failed. Copy it again from its source."
    if head.startswith(b"version https://git-lfs"):
        message = f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the weights that it stands for. "
        return message + "Run `git lfs pull` in its repository, or download the file itself."
    if text[:1] == b"<":
        message = f"{path} is an HTML or XML page, such as a login or error page instead of a download. "
        return message + "Open its address in a browser to see what it asks for, and download the file again."
    if head.startswith(OLD_TORCH):
        message = f"{path} has the format of torch before 1.6, which cannot be read piece by piece. Save it again: "
        return message + SAVE_AGAIN.format(path=path)
    if head.startswith(b"PK\x03\x04"):
        return None if path.suffix != ".safetensors" else f"{path} is a .pt (zip) file. Rename it to end in .pt."
    if head[8:9] == b"{" and path.suffix != ".safetensors":
        return f"{path} is a safetensors file. Rename it to end in .safetensors."
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return f"{path} is a compressed file. Unpack it first."
    if head.isascii() and b"\0" not in head:
        shown = " ".join(head.decode().split())[:80]
        return (
            f"{path} is a text file ({shown!r} ...), not weights. Download it again, and look at what its source says."
        )
    return None
