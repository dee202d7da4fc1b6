"""Peak memory of real training ranks and the time of resizes, against the estimates of `train --dry-run`.

    python tools/measure_memory.py --json      the held-out cases, measured and estimated; the largest errors
    python tools/measure_memory.py --write     all cases: fits the constants anew, on this machine, and writes
                                               entprune_ds/estimate.json (about half an hour on 2 cores)

Every case runs in processes of its own, over gloo on the CPU. What counts is the peak of a rank's resident memory over
building an engine and three optimizer steps, above what the same process held after it had trained a tiny model; of
several ranks the largest. It includes what glibc keeps of freed memory. The constants are fitted to cases that vary
width, batch, world size, ZeRO stage and precision; the held-out cases differ from them in shape, world size or topology
and are not used for the fit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.memory_ranks import FITTED, HELD_OUT, RESIZES, STAGES, config_of, kept_after  # noqa: E402

Measurement = tuple[dict[str, Any], str, Any]
"""Case, mode (peak or resize) and what was found."""


def measure(case: dict[str, Any], mode: str) -> Any:
    """Run a case on its ranks: the largest peak, or for `resize` the removals of the slowest rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, world_size = s.getsockname()[1], case["world_size"]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
                "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = [sys.executable, str(ROOT / "tools/memory_ranks.py"), json.dumps(case), mode, folder]
            with open(f"{folder}/log_{rank}", "w") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        if any([p.wait(600) for p in ranks]):
            raise RuntimeError("\n".join(Path(f"{folder}/log_{r}").read_text()[-3000:] for r in range(world_size)))
        results = [json.loads(Path(f"{folder}/result_{r}").read_text()) for r in range(world_size)]
    return max(results, key=lambda r: r[-1]["seconds"] if isinstance(r, list) else r)


def estimated(case: dict[str, Any], rates: dict[str, Any]) -> int:
    """Bytes of the largest pipeline stage, as --dry-run prints them."""
    from entprune_ds.estimate import rank_memory

    with tempfile.TemporaryDirectory() as folder:
        return max(m.total for m in rank_memory(config_of(case, folder), case["world_size"], rates))


def estimated_resize(case: dict[str, Any], before: Iterable[int], constants: dict[str, Any]) -> Any:
    """The estimate for a removal of a RESIZES case."""
    from entprune_ds.estimate_resize import removal_estimate

    config, blocks = config_of(case, ""), tuple(before)
    config = replace(config, model=replace(config.model, kept_blocks=blocks))
    return removal_estimate(config, case["world_size"], kept_after(case, blocks), constants)


def removal_seconds(case: dict[str, Any], before: Iterable[int], constants: dict[str, Any]) -> float:
    """The estimated time alone."""
    return estimated_resize(case, before, constants).seconds


def compared(case: dict[str, Any], mode: str, found: Any, constants: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of measured and estimated figures with their relative error."""
    if mode != "resize":
        guess = estimated(case, constants["memory"])
        return [{**case, "measured_bytes": found, "estimated_bytes": guess, "error": round(guess / found - 1, 3)}]
    rows = []
    for removal in found:
        guess = estimated_resize(case, removal["before"], constants)
        rows.append({
            **case, "depth": len(removal["before"]), "measured_seconds": round(removal["seconds"], 3),
            "estimated_seconds": round(guess.seconds, 3), "error": round(guess.seconds / removal["seconds"] - 1, 3),
            "bytes_state": removal["bytes_state"], "estimated_bytes_state": guess.moved,
        })  # fmt: skip
    return rows


def blank() -> dict[str, Any]:
    """Constants of nothing on top of what is counted."""
    buffers = {name: {"replicated": 0.0, "sharded": 0.0} for name in STAGES}
    kinds = [f"zero{stage}" for stage in range(4)] + ["pipeline"]
    resize: dict[str, Any] = {name: {"seconds": 0.0, "seconds_per_parameter": 0.0} for name in kinds}
    return {
        "memory": {"working_blocks": 0.0, "released": 0.0, "buffers": buffers},
        "resize": resize | {"seconds_per_byte": 0.0},
    }


def fit(measured: list[Measurement]) -> dict[str, Any]:
    """Constants with the least squares of the relative errors; none is negative. Estimates are linear in them."""
    constants = blank()
    memory = constants["memory"]
    kinds = {name: ("sharded",) if name.startswith("zero0") else ("replicated", "sharded") for name in STAGES}
    rates = [(memory["buffers"][name], kind) for name in STAGES for kind in kinds[name]]  # ZeRO-0: nothing is sharded
    peaks = [(partial(estimated, case, memory), found) for case, _, found in measured if case in FITTED]
    _solve([(memory, "working_blocks"), (memory, "released"), *rates], peaks)
    resize = constants["resize"]
    costs = [(resize[name], kind) for name in resize if name != "seconds_per_byte" for kind in resize[name]]
    times = [
        (partial(removal_seconds, case, removal["before"], constants), removal["seconds"])
        for case, mode, found in measured if mode == "resize" for removal in found
    ]  # fmt: skip
    _solve([(resize, "seconds_per_byte"), *costs], times)
    return constants


def _solve(knobs: list[tuple[dict[str, float], str]], rows: list[tuple[Callable[[], float], float]]) -> None:
    """Set every knob so that what the functions return is nearest to the figures beside them."""
    import numpy as np
    from scipy.optimize import nnls

    for place, name in knobs:
        place[name] = 0.0
    counted, columns = np.array([f() for f, _ in rows]), []
    for place, name in knobs:
        place[name] = 1.0
        columns.append(np.array([f() for f, _ in rows]) - counted)
        place[name] = 0.0
    wanted = np.array([figure for _, figure in rows])
    values, _ = nnls(np.stack(columns, axis=1) / wanted[:, None], (wanted - counted) / wanted)
    for (place, name), value in zip(knobs, values, strict=True):
        place[name] = float(f"{value:.4g}")


def machine() -> dict[str, str]:
    """Where and with what the figures were taken."""
    import deepspeed
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": f"{os.cpu_count()} cores of {cpu}",
        "torch": torch.__version__, "deepspeed": deepspeed.__version__,
    }  # fmt: skip


def all_measured(wanted: list[tuple[dict[str, Any], str]], path: Path | None = None) -> list[Measurement]:
    """Measurements of all (case, mode); those that the file at `path` holds already are taken from there."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    found: list[Measurement] = []
    for case, mode in wanted:
        old = [result for c, m, result in known if (c, m) == (case, mode)]
        found.append((case, mode, old[-1] if old else measure(case, mode)))
        print(f"{len(found)} of {len(wanted)}: {mode} {json.dumps(case)}", file=sys.stderr, flush=True)
        if path and not old:
            with path.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def summary(measured: list[Measurement], constants: dict[str, Any]) -> dict[str, Any]:
    """Largest errors and all rows, held-out cases first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case, mode, found in measured:
        kind = "held_out" if case in HELD_OUT else "fitted" if case in FITTED else mode
        rows.setdefault(kind, []).extend(compared(case, mode, found, constants))
    return {"largest_error": {kind: max(abs(r["error"]) for r in found) for kind, found in rows.items()}, **rows}


def main() -> int:
    """Measure, compare, and fit when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--write", action="store_true", help="measure everything, fit the constants and write them")
    parser.add_argument("--all", action="store_true", help="compare the cases of the fit and the resizes too")
    parser.add_argument("--measured", type=Path, help="file that keeps measurements, to go on after an interruption")
    options = parser.parse_args()
    from entprune_ds.estimate import CONSTANTS, load_constants

    wanted = [(case, "peak") for case in HELD_OUT]
    if options.write or options.all:
        wanted += [*((case, "peak") for case in FITTED), *((case, "resize") for case in RESIZES)]
    measured = all_measured(wanted, options.measured)
    constants = fit(measured) if options.write else load_constants()
    found = summary(measured, constants)
    if options.write:
        facts = {"held_out_cases": len(HELD_OUT), "largest_error": found["largest_error"]["held_out"]}
        facts |= {"largest_error_seconds": found["largest_error"]["resize"]}
        constants = {"measured": machine() | facts, **constants}
        CONSTANTS.write_text(json.dumps(constants, indent=2) + "\n")
    print(json.dumps(found, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
