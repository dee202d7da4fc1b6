"""What a start finds and writes in the run folder beside the checkpoints: settings, metrics, decisions, pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from entprune_ds import comm
from entprune_ds.atomic import write_text
from entprune_ds.config import Config, to_yaml
from entprune_ds.environment import environment, launch_command
from entprune_ds.faults import check_space
from entprune_ds.models.registry import count_parameters
from entprune_ds.monitor.interface import Monitor
from entprune_ds.monitor.metrics import open_monitor, rewind_metrics
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.rollback import rollback_done


def open_folder(
    config: Config, arguments: list[str], step: int, decisions: list[PruneDecision], metrics_bytes: int
) -> Monitor:
    """Write config.yaml and env.json, move aside what the checkpoint does not know, and open the monitor (rank 0)."""
    folder, error, monitor = config.run_dir, None, open_monitor(config, config.run_dir, enabled=False)
    if comm.is_main():
        try:
            for unfinished in (folder / "checkpoints").glob(".writing_*"):  # first: they may be what fills the disk
                shutil.rmtree(unfinished)
            error = check_space(folder, needed_bytes=2 * 16 * count_parameters(config.model))
            data = replace(config.data, allow_pipe=False)  # counts for one command line, not for who reads the folder
            prune = replace(config.prune, rollback=rollback_done(config))
            stored = replace(config, data=data, prune=prune)
            write_text(folder / "config.yaml", to_yaml(stored))
            command = launch_command(arguments, comm.world_size())
            write_text(folder / "env.json", json.dumps(environment(config, comm.world_size(), command), indent=2))
            rewind_metrics(folder, step, metrics_bytes)
            rewind_samples(folder / "samples", step)
            write_decisions(folder / "decisions.jsonl", decisions)
            monitor = open_monitor(stored, folder, enabled=True)
        except OSError as problem:
            error = f"run folder {folder} cannot be written: {problem}. Free space or choose another `run.root`."
    comm.raise_together(error)
    return monitor


def rewind_samples(folder: Path, step: int) -> None:
    """Move pictures of later steps, and of the check at this one, to `superseded`: they show what is left behind."""
    for picture in folder.glob("step_*.png"):
        number = picture.name.split("_")[1].removesuffix(".png")
        if number.isdecimal() and (int(number) > step or (int(number) == step and "_check_" in picture.name)):
            (folder / "superseded").mkdir(exist_ok=True)
            picture.replace(folder / "superseded" / picture.name)


def write_decisions(path: Path, decisions: list[PruneDecision]) -> None:
    """Write decisions.jsonl; lines that a resume has left behind move to decisions.superseded.jsonl."""
    lines = [json.dumps(d.to_json(), allow_nan=False) for d in decisions]
    old = path.read_text().splitlines() if path.is_file() else []
    aside = [line for line in old if line not in lines]
    if aside:
        with open(path.with_name("decisions.superseded.jsonl"), "a") as file:
            file.write("\n".join(aside) + "\n")
    write_text(path, "".join(line + "\n" for line in lines))
