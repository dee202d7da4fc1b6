"""What a run was made with: the command, the commit, versions and the config digest, kept in env.json."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from entprune_ds.config import Config, digest, to_stored
from entprune_ds.redact import redacted

PACKAGES = ("entprune_ds", "torch", "deepspeed", "webdataset", "wandb", "safetensors", "numpy", "scipy", "clean-fid")


def environment(config: Config, world_size: int, command: str) -> dict[str, Any]:
    """Plain values for env.json; nothing of the environment variables is stored."""
    return {
        "command": command,
        "commit": commit(),
        "config_digest": digest(to_stored(config)),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size,
    }


def launch_command(arguments: list[str], world_size: int) -> str:
    """The command line that repeats this run, quoted for a shell; secrets of addresses are left out."""
    words = " ".join(shlex.quote(redacted(a)) for a in arguments)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
    nodes = f"--num_nodes {world_size // local} " if world_size > local else ""
    launcher = "python -m" if world_size == 1 else f"deepspeed {nodes}--num_gpus {local} --module"
    return f"{launcher} entprune_ds.cli.train {words}"


def commit() -> str:
    """Git commit of the source tree, or "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
