"""`entprune_ds.cli.slurm`: what slurm/env.sh and slurm/prune_xl.sh ask before and after the ranks; not for people.

    begin most=3 start=1 job=12 logs=DIR -- WORDS   on one node: checks WORDS, counts this start, prints the run folder
    again most=3 start=1 job=12 logs=DIR status=75 -- WORDS   the ranks have failed: may the job be requeued?
    node gpus=8 folder=DIR sees=FILE port=23456     on every node: can ranks run here? Prints a free port, from this on

Exit status: 0 yes, 2 refused (with the reason), 3 a crash loop.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from entprune_ds import restarts
from entprune_ds.cli.common import launched_words, leave, refuse, wants_help
from entprune_ds.config import ConfigError, load_config
from entprune_ds.locks import FolderBusy, locked

PORTS = range(20000, 32000)
"""Below those that Linux hands out itself, above those of services."""


def main(argv: list[str] | None = None) -> int:
    """Run one of the three; returns the exit status."""
    words, dry_run = launched_words(argv)
    end = words.index("--") if "--" in words else len(words)
    asked, rest = dict(word.split("=", 1) for word in words[1:end]), words[end + 1 :]
    if words[0] == "node":
        return node(int(asked["gpus"]), asked["folder"], asked["sees"], int(asked["port"]))
    if wants_help(rest) or dry_run:
        return 0  # there is no run; the ranks tell
    try:
        folder = load_config(rest).run_dir
        if words[0] == "begin":
            with locked(folder, "`run.name` or `run.root`"):  # or the count of the job that works there would be lost
                count = restarts.begin(folder, asked["job"], int(asked["start"])).count
        else:
            count = restarts.next_count(folder)
            if int(asked["status"]) == 2 and (count > 0 or not restarts.is_of(folder, asked["job"])):
                return 2  # the ranks have said why; what comes after progress may pass, such as a file server's
    except ConfigError as error:
        return refuse(error.problems)
    except FolderBusy as error:
        return refuse([str(error)])
    except OSError as error:
        return refuse([f"the run folder cannot be written: {error}. Free space or choose another `run.root`."])
    problem = restarts.loop_problem(folder, int(asked["most"]), count, Path(asked["logs"]))
    if problem is not None:
        refuse([problem])
        return 3
    if words[0] == "begin":
        print(folder)
    return 0


def node(gpus: int, folder: str, sees: str, port: int) -> int:
    """Check this node; every problem is a line, and so is the port when there is none."""
    found = _import_problems() or _gpu_problems(gpus)
    if folder:
        found += _folder_problems(Path(folder), sees)
    for problem in found:
        print(f"{socket.gethostname()}: {problem}")
    if found:
        return 2
    print(f"port {free_port(port)}")
    return 0


def _import_problems() -> list[str]:
    try:
        from entprune_ds import comm

        comm.prepare_environment()
        import entprune_ds.engine.build  # noqa: F401  (torch and deepspeed)
    except Exception as error:  # whatever is wrong with an installation
        what = f"{sys.executable} cannot import torch and deepspeed ({type(error).__name__}: {error})"
        return [f"{what}. Set ENTPRUNE_PYTHON to the interpreter of an environment that every node sees."]
    return []


def _gpu_problems(gpus: int) -> list[str]:
    import torch

    there = torch.cuda.device_count() if gpus else 0
    if there < gpus:
        return [f"torch finds {there} of the {gpus} GPUs that the job asked for. See nvidia-smi on the node."]
    found = []
    for index in range(gpus):
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            found.append(f"GPU {index} does not work: {str(error).splitlines()[0]}")
    return found


def _folder_problems(folder: Path, sees: str) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".node_") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [f"{folder} cannot be written ({error.strerror or error}). Choose a folder that all nodes can write."]
    if sees and not Path(sees).is_file():
        return [f"{sees}, which the first node has written, is not there. Choose a folder that all nodes share."]
    return []


def free_port(first: int) -> int:
    """The first free TCP port from `first` on, round to the start of PORTS."""
    for port in (*range(first, PORTS.stop), *range(PORTS.start, first)):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the rendezvous itself does
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop - 1}")


if __name__ == "__main__":
    leave(main())
