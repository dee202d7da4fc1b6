"""What follows on a step that does not count: it is told, and after several in a row the run goes back.

Going back takes weights, moments, EMA, decisions and the step from the newest checkpoint that is older than the bad
stretch; the data go on where they are, so the bad batches are passed over. All of it follows from the checkpoint and
the data alone: a run that is killed afterwards comes to the same bad steps again and does the same.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from entprune_ds import comm, fault_points
from entprune_ds.data.origin import batch_origin
from entprune_ds.engine.build import destroy_engine
from entprune_ds.engine.checkpoint import find_checkpoint, step_folders
from entprune_ds.logs import get_logger
from entprune_ds.monitor.files import read_json_lines
from entprune_ds.recovery import PlainRecovery
from entprune_ds.rollback import set_aside, step_of
from entprune_ds.run_state import Run, run_from, stream_state

log = get_logger()

FILE = "bad_steps.jsonl"
"""In the run folder: every bad step, in the order of time, also those that a resume or a roll-back repeats."""


def left_out(run: Run, loss: Tensor) -> None:
    """Tell of the newest step, which was left out: why, the ranks, the shards and the keys. Collective."""
    ranks = comm.all_gather_json(_on_this_rank(run, loss))
    suspects = [r for r in range(len(ranks)) if ranks[r]["loss"] is None]
    if not suspects and run.guard.reason.startswith("the loss"):
        highest = max(r["loss"] for r in ranks)
        suspects = [r for r in range(len(ranks)) if ranks[r]["loss"] == highest]
    row = {
        "step": run.step, "time": round(time.time(), 3), "reason": run.guard.reason, "in_a_row": run.guard.in_a_row,
        "skipped": run.guard.skipped, "rollbacks": run.guard.rollbacks, "ranks": suspects,
        "shards": sorted({shard for r in suspects for shard in ranks[r]["shards"]}),
        "keys": [key for r in suspects for key in ranks[r]["keys"]],
    }  # fmt: skip
    if comm.is_main():
        with open(run.folder / FILE, "a") as file:
            file.write(json.dumps(row) + "\n")
    run.monitor.log(run.step, {"train/skipped_steps": run.guard.skipped})
    where = _where(row)
    text = "step %d does not count: %s%s. Bad steps in a row: %d (train.bad_steps %d), in all: %d"
    log.warning(
        text, run.step, run.guard.reason, where, run.guard.in_a_row, run.config.train.bad_steps, run.guard.skipped
    )


def _on_this_rank(run: Run, loss: Tensor) -> dict[str, Any]:
    """The loss of this data-parallel rank (None for NaN and infinite ones) and, on a first stage, its batch."""
    value = loss.item()
    found: dict[str, Any] = {"loss": value if math.isfinite(value) else None, "shards": [], "keys": []}
    if run.engine.pipe_stage == 0:
        try:
            origin = batch_origin(run.stream)
            found |= {"shards": origin.shards, "keys": origin.keys}
        except (ValueError, OSError) as problem:
            found["shards"] = [f"unknown ({problem})"]
    return found


def _where(row: dict[str, Any]) -> str:
    """Ranks, shards and keys of a bad step in a few words."""
    if not row["ranks"]:
        return ""
    ranks, shards, keys = (_some(row[what]) for what in ("ranks", "shards", "keys"))
    return f" (rank {ranks}; shards {shards}; examples {keys})"


def _some(names: list) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(str, names[:4])) + more


def go_back(run: Run) -> None:
    """Put the run back to its newest checkpoint from before the bad steps; the data go on. Collective.

    Raises:
        DistributedError: on all ranks, when it has gone back train.max_rollbacks times already, or all checkpoints are
            from within the bad steps.
    """
    guard, train, root = run.guard, run.config.train, run.folder / "checkpoints"
    first = run.step - guard.in_a_row
    if guard.rollbacks >= train.max_rollbacks:
        raise comm.DistributedError(_report(run, first))
    folders = [Path(name) for name in comm.broadcast_json([str(p) for p in step_folders(root)])]
    later = [folder for folder in folders if step_of(folder.name) > first]
    earlier = [folder for folder in folders if folder not in later]
    if later and not earlier:
        message = f"steps {first + 1} to {run.step} are bad, and no checkpoint in {root} is from before them. "
        raise comm.DistributedError(message + f"Look at {run.folder / FILE}; restore one, or take another run.name.")
    cursor = stream_state(run)
    set_aside(root, earlier[-1] if earlier else None, later)
    log.warning("%d bad steps in a row, from step %d on: going back", guard.in_a_row, first + 1)
    run.stream.close()
    run.monitor.finish()
    destroy_engine(run.engine)
    run.recovery = PlainRecovery()  # a teacher gives its memory back before the next one comes
    before = run_from(run.config, run.arguments, find_checkpoint(root, log.warning))
    before.stream.load_state(cursor)
    before.guard.skipped, before.guard.rollbacks, before.guard.in_a_row = guard.skipped, guard.rollbacks + 1, 0
    vars(run).update(vars(before))
    run.monitor.log(run.step, {"train/skipped_steps": guard.skipped, "train/rollbacks": run.guard.rollbacks})
    text = "went back to step %d (roll-back %d of at most %d); the data go on after the bad steps"
    log.warning(text, run.step, run.guard.rollbacks, train.max_rollbacks)
    fault_points.reach("rollback")


def _report(run: Run, first: int) -> str:
    guard, text = run.guard, ""
    if comm.is_main():
        rows = read_json_lines(run.folder / FILE).rows
        text = "".join(f"\n  step {r['step']}: {r['reason']}{_where(r)}" for r in rows[-guard.in_a_row :][:5])
    message = f"steps {first + 1} to {run.step} are bad, and the run has gone back {guard.rollbacks} times already "
    message += (
        f"(train.max_rollbacks). First of them:{text}\nAll are in {run.folder / FILE}. Look at these examples; if "
    )
    message += "they are sound, lower train.learning_rate and start under another run.name from an export of the "
    return message + "newest checkpoint, or raise train.max_rollbacks."
