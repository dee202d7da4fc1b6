"""Resumable checkpoints: one safetensors file per rank and a JSON manifest; nothing is ever unpickled.

    checkpoints/step_00000100/rank_00000.safetensors   this rank's pieces, "KEY/NAME" -> (numel,) f32
    checkpoints/step_00000100/manifest.json            who holds what, checksums (its own too), the training record
    checkpoints/latest                                 name of the newest complete one, written last

A folder appears under its final name only when it is complete: temporary name, fsync, rename.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entprune_ds import comm, fault_points
from entprune_ds.atomic import file_sha256, sync, write_text
from entprune_ds.config import ModelConfig, digest
from entprune_ds.engine.build import Engine
from entprune_ds.engine.state import KEYS, Piece, state_tensor, write_state
from entprune_ds.plain_json import parse_json

FORMAT = 1
REMEDY = "Check the data, or lower train.learning_rate and start under another run.name; earlier checkpoints stay."


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Training step at which it was written."""
        return int(self.manifest["step"])

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the blocks it holds."""
        return tuple(self.manifest["kept_blocks"])

    def model(self, start: ModelConfig) -> ModelConfig:
        """The architecture that it holds, given the one that its run started with."""
        widths = self.manifest.get("block_widths", ())  # older checkpoints have none
        return replace(start, kept_blocks=self.kept_blocks, block_widths=tuple(tuple(w) for w in widths))


def save_checkpoint(engine: Engine, root: Path, step: int, record: dict[str, Any]) -> Path:
    """Write a checkpoint of the whole training state. Collective: all ranks call.

    Args:
        root: the checkpoints folder.
        step: training step that comes next.
        record: plain values that the trainer needs to go on (data cursor, decisions, config, ...).

    Raises:
        DistributedError: on all ranks, when any rank cannot write (disk full, read-only) or holds NaN or infinite
            state; an older checkpoint is never touched.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f".writing_step_{step:08d}"
    error = None
    if comm.is_main():
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as problem:
            error = _disk_error(temporary, problem)
    comm.raise_together(error)
    try:
        mine: dict[str, Any] | None = _write_pieces(engine, temporary / f"rank_{comm.rank():05d}.safetensors")
    except (OSError, SafetensorError) as problem:
        mine, error = None, _disk_error(temporary, problem)
    except FloatingPointError as problem:
        mine, error = None, f"step {step}: {problem}"
    comm.raise_together(error)
    files = comm.all_gather_json(mine)
    fault_points.reach("checkpoint")
    if comm.is_main():
        manifest = {
            "format": FORMAT, "step": step, "kept_blocks": list(engine.kept_blocks),
            "block_widths": engine.model_config.block_widths, "adam_step": engine.adam_step,
            "ema_count": engine.ema_count, "shapes": {n: list(s) for n, s in engine.shapes.items()},
            "files": files, "record": record,
        }  # fmt: skip
        try:
            manifest["sha256"] = manifest_sha256(manifest)
            write_text(temporary / "manifest.json", json.dumps(manifest, allow_nan=False))
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync(root)
            fault_points.reach("latest")
            write_text(root / "latest", final.name)
        except OSError as problem:
            error = _disk_error(final, problem)
    comm.raise_together(error)
    return final


def _disk_error(path: Path, problem: Exception) -> str:
    return f"cannot write {path}: {problem}. Free space or choose another `run.root`, then run the same command again."


def _write_pieces(engine: Engine, path: Path) -> dict[str, Any]:
    tensors, ranges = {}, []
    holders: dict[tuple[str, int, int], list[int]] = {}
    for rank, held in enumerate(engine.layout):
        for name, start, stop in held:
            holders.setdefault((name, start, stop), []).append(rank)
    for piece in engine.pieces:  # replicas (ZeRO-0) save equal shares of what they hold in common
        replicas = holders[piece.name, piece.start, piece.stop]
        share = -(-piece.numel // len(replicas))
        start = min(piece.start + share * replicas.index(comm.rank()), piece.stop)
        stop = min(start + share, piece.stop)
        if start < stop:
            ranges.append([piece.name, start, stop])
            for key in KEYS:
                value = state_tensor(piece, key, engine.optimizer, engine.ema)[start - piece.start : stop - piece.start]
                if not bool(torch.isfinite(value).all()):
                    raise FloatingPointError(f"{key} of {piece.name} is not finite: no checkpoint written. {REMEDY}")
                tensors[f"{key}/{piece.name}"] = value.cpu().clone()
    save_file(tensors, path)
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "ranges": ranges}


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Checksum of all that a manifest says, as it is read back (JSON knows no tuples), itself apart."""
    return digest(json.loads(json.dumps({k: v for k, v in manifest.items() if k != "sha256"})))


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that is known to be intact. Local.

    Raises:
        ValueError: when a newer version has written it.
    """
    manifest = parse_json((folder / "manifest.json").read_text())
    if manifest["format"] > FORMAT:
        message = f"{folder} has format {manifest['format']}, this version of entprune_ds reads up to {FORMAT}. "
        raise ValueError(message + "Install the version that wrote it (env.json of the run names it).")
    return Checkpoint(folder, manifest)


def step_folders(root: Path) -> list[Path]:
    """Folders of checkpoints, oldest first; copies under other names (step_00000400_backup) are not ours."""
    ours = [p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name)]
    return sorted(ours, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None. Collective: all ranks check some files, all get the same answer.

    Broken ones (truncated, checksum wrong) are reported through `warn` and the one before is used.

    Raises:
        DistributedError: on all ranks, when there are checkpoints and none is intact: starting again from step 0
            would overwrite them; or when the newest intact one comes from a newer version.
    """
    found = comm.broadcast_json([p.name for p in step_folders(root)][::-1] if comm.is_main() else None)
    for name in found:
        problems = [p for part in comm.all_gather_json(file_problems(root / name)) for p in part]
        if not problems:
            try:
                return read_checkpoint(root / name)
            except ValueError as problem:  # the same on all ranks
                raise comm.DistributedError(str(problem)) from problem
        warn(f"checkpoint {name} is damaged and is not used: {problems[0]}.")
    if found:
        message = f"none of the {len(found)} checkpoints in {root} is intact. Restore one, or move the run folder away "
        raise comm.DistributedError(message + "to start again.")
    return None


def file_problems(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint that this rank checks (every world_size-th). Local."""
    try:
        manifest = parse_json((folder / "manifest.json").read_text())
        if manifest.get("sha256", known := manifest_sha256(manifest)) != known:  # older checkpoints have none
            return [f"manifest.json has the checksum {known}, not the one that it names"]
        if manifest["format"] > FORMAT:
            return []  # not damaged: read_checkpoint says what it is
        if type(manifest["step"]) is not int:
            return [f"manifest.json has the step {manifest['step']!r}"]
        for entry in manifest["files"][comm.rank() :: comm.world_size()]:
            path = folder / entry["name"]
            if path.stat().st_size != entry["bytes"]:
                return [f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"]
            if file_sha256(path) != entry["sha256"]:
                return [f"{path.name} has a wrong checksum"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Fill an engine of the checkpoint's depth, at any world size and ZeRO stage. Collective.

    Raises:
        DistributedError: on all ranks, when names or shapes differ from the model, listing them.
    """
    saved = {n: tuple(s) for n, s in checkpoint.manifest["shapes"].items()}
    wrong = sorted(n for n in saved.keys() | engine.shapes.keys() if saved.get(n) != engine.shapes.get(n))
    if wrong:
        message = f"{checkpoint.folder} holds another model; parameters that differ: {', '.join(wrong[:8])}"
        raise comm.DistributedError(
            message + f"{' ...' if len(wrong) > 8 else ''}. Use the config of that run, or another run.name."
        )
    read = range_reader(checkpoint)

    def read_piece(piece: Piece) -> dict[str, Tensor]:
        return read(piece.name, piece.start, piece.stop)

    write_state(engine.ds, engine.optimizer, engine.ema, checkpoint.manifest["adam_step"], read_piece)
    engine.ema_count = checkpoint.manifest["ema_count"]


def range_reader(checkpoint: Checkpoint, keys: tuple[str, ...] = KEYS) -> Callable[[str, int, int], dict[str, Tensor]]:
    """(name, start, stop) -> {key: (stop - start,) f32} from the files of all saved ranks, by memory map. Local."""
    where: dict[str, list[tuple[int, int, int]]] = {}
    handles = []
    for index, entry in enumerate(checkpoint.manifest["files"]):
        handles.append(safe_open(checkpoint.folder / entry["name"], framework="pt"))
        for name, start, stop in entry["ranges"]:
            where.setdefault(name, []).append((index, start, stop))

    def read(name: str, first: int, last: int) -> dict[str, Tensor]:
        out = {key: torch.full((last - first,), float("nan")) for key in keys}
        for index, start, stop in where[name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                for key in keys:
                    part = handles[index].get_slice(f"{key}/{name}")[low - start : high - start]
                    out[key][low - first : high - first] = part
        return out

    return read


def prune_old(root: Path, keep_last: int, keep_steps: set[int]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of `keep_steps`. Rank 0 only."""
    for folder in step_folders(root)[:-keep_last]:
        if int(folder.name.removeprefix("step_")) not in keep_steps:
            shutil.rmtree(folder, ignore_errors=True)
