"""Peak memory of real training ranks and the time of resizes, against the estimates of `train --dry-run`.

    python tools/measure_memory.py --json      the held-out cases, measured and estimated; the largest error
    python tools/measure_memory.py --write     all cases: fits the constants anew, on this machine, and writes
                                               entprune_ds/estimate.json (about half an hour on 2 cores)

Every case runs in processes of its own, over gloo on the CPU. What counts is the peak of a rank's resident memory over
building an engine and three optimizer steps, above what the same process held after it had trained a tiny model; of
several ranks the largest. The constants are fitted to cases that vary width, batch, world size, ZeRO stage and
precision; the held-out cases differ from them in shape, world size or topology and are not used for the fit.
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
STEPS = 3
"""Optimizer steps of a case: from the second one on ZeRO-3 knows the order of the layers and keeps what comes again."""
STAGES = [f"zero{stage}_{dtype}" for dtype in ("fp32", "bf16") for stage in range(4)]
SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 256, "depth": 12, "micro_batch": 4, "world_size": 1},
    {"hidden_size": 256, "depth": 12, "micro_batch": 16, "world_size": 2},
    {"hidden_size": 384, "depth": 12, "micro_batch": 4, "world_size": 2},
]
FITTED = [{"ds_config": name, **shape} for name in STAGES for shape in SHAPES]
TWO = {"world_size": 2, "micro_batch": 4}
HELD_OUT: list[dict[str, Any]] = [
    {"ds_config": "zero0_fp32", "hidden_size": 448, "depth": 10, "micro_batch": 8, "world_size": 1},
    {"ds_config": "zero1_fp32", "hidden_size": 320, "depth": 16, **TWO, "micro_batch": 8},
    {"ds_config": "zero1_fp32", "hidden_size": 320, "depth": 20, **TWO, "world_size": 4},
    {"ds_config": "zero2_fp32", "hidden_size": 320, "depth": 14, **TWO, "micro_batch": 32, "checkpointing": True},
    {"ds_config": "zero2_fp32", "hidden_size": 384, "depth": 16, **TWO, "zero": {"reduce_bucket_size": 2_000_000}},
    {"ds_config": "zero3_fp32", "hidden_size": 320, "depth": 18, **TWO, "micro_batch": 8},
    {"ds_config": "zero3_fp32", "hidden_size": 384, "depth": 16, **TWO,
     "zero": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1_000_000}},
    {"ds_config": "zero1_bf16", "hidden_size": 320, "depth": 16, **TWO, "micro_batch": 8},
    {"ds_config": "zero2_bf16", "hidden_size": 320, "depth": 14, **TWO, "accumulation": 2},
    {"ds_config": "zero3_bf16", "hidden_size": 448, "depth": 10, **TWO},
    {"ds_config": "zero2_offload", "hidden_size": 384, "depth": 14, **TWO},
    {"ds_config": "zero1_fp32", "hidden_size": 384, "depth": 16, **TWO, "micro_batch": 8, "accumulation": 2,
     "pipe_stages": 2},
]  # fmt: skip
RESIZES: list[dict[str, Any]] = [
    {"ds_config": f"zero{stage}_fp32", "hidden_size": width, "depth": depth, "micro_batch": 2, "world_size": 2, **more}
    for width, depth in ((256, 12), (384, 20))
    for stage, more in ((0, {}), (1, {}), (2, {}), (3, {}), (1, {"pipe_stages": 2}))
]
REMOVALS = 3
"""Removals of a RESIZES case, each of a quarter of the blocks, evenly over the depth."""


def config_of(case: dict[str, Any], folder: str) -> Any:
    """The Config of a case; `folder` takes a DeepSpeed configuration when the case has one of its own."""
    from entprune_ds.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
    from entprune_ds.engine.ds_config import find_ds_config

    name = case["ds_config"]
    if "zero" in case:
        values = json.loads(find_ds_config(name).read_text())
        values["zero_optimization"] |= case["zero"]
        name = f"{folder}/ds_{os.getpid()}.json"
        Path(name).write_text(json.dumps(values))
    stages, accumulation = case.get("pipe_stages", 1), case.get("accumulation", 1)
    replicas = case["world_size"] // stages
    model = ModelConfig(
        depth=case["depth"], hidden_size=case["hidden_size"], num_heads=case["hidden_size"] // 64, input_size=16,
        num_classes=10, activation_checkpointing=case.get("checkpointing", False),
    )  # fmt: skip
    batch = case["micro_batch"] * accumulation * replicas
    return Config(
        model=model, data=DataConfig(num_readers=replicas),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=case["micro_batch"]),
        parallel=ParallelConfig(ds_config=name, pipe_stages=stages),
    )  # fmt: skip


def tiny(config: Any) -> Any:
    """The same run with a model that weighs nothing: what follows finds everything imported and connected."""
    train = replace(config.train, global_batch_size=2 * config.train.global_batch_size // config.train.micro_batch_size)
    model = replace(config.model, depth=4, hidden_size=64, num_heads=1)
    return replace(config, model=model, train=replace(train, micro_batch_size=2))


def trained(config: Any) -> Any:
    """An engine after STEPS optimizer steps on random data."""
    import torch

    from entprune_ds.diffusion.objective import build_objective
    from entprune_ds.engine.build import build_engine, initialize_fresh, train_step

    model = config.model
    engine = build_engine(config, model)
    initialize_fresh(engine, seed=0)
    objective, count = build_objective(model, config.diffusion), config.train.global_batch_size // engine.dp_size
    latents = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    labels = torch.zeros(count, dtype=torch.long)
    for step in range(STEPS):
        draws = objective.make_draws(latents, labels, range(count), seed=0, purpose="train", step=step)
        train_step(engine, draws.split(config.train.micro_batch_size), objective.loss)
        engine.update_ema(0.9)
    return engine


def status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1])


def rank_peak(case: dict[str, Any], folder: str) -> int:
    """Bytes that this rank's peak lies above the same process after a tiny model. Collective."""
    from entprune_ds.engine.build import destroy_engine

    config = config_of(case, folder)
    destroy_engine(trained(tiny(config)))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    destroy_engine(trained(config))
    return status("VmHWM") - before


def rank_resizes(case: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """What the removals of a case take, after those of a tiny model. Collective."""
    from entprune_ds.engine.build import destroy_engine
    from entprune_ds.engine.resize import resize
    from entprune_ds.estimate import evenly

    found: list[dict[str, Any]] = []
    for config in (tiny(config_of(case, folder)), config_of(case, folder)):
        found.clear()
        engine = trained(config)
        for _ in range(REMOVALS if config.model.depth > 4 else 1):
            before = engine.kept_blocks
            cut = None if engine.cut is None else even_cut(config, len(before) - len(before) // 4, case["world_size"])
            engine, report = resize(engine, config, evenly(before, len(before) // 4), cut)
            found.append({"before": before, "seconds": report.seconds, "bytes_state": report.bytes_state})
        destroy_engine(engine)
    return found


def even_cut(config: Any, depth: int, world_size: int) -> tuple[int, ...]:
    """The cut of a pipeline that the estimate takes."""
    from entprune_ds.estimate import plan_of

    return plan_of(config, world_size, depth).cut


def measure(case: dict[str, Any]) -> Any:
    """Run a case on its ranks: the largest peak, or for a case of RESIZES the list of the slowest rank."""
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port, world_size = s.getsockname()[1], case["world_size"]
        s.close()
        ranks = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
                "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = [sys.executable, __file__, "--case", json.dumps(case), "--folder", folder]
            with open(f"{folder}/log_{rank}", "w") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        if any([p.wait(600) for p in ranks]):
            raise RuntimeError("\n".join(Path(f"{folder}/log_{r}").read_text()[-3000:] for r in range(world_size)))
        results = [json.loads(Path(f"{folder}/result_{r}").read_text()) for r in range(world_size)]
    return max(results, key=lambda r: r[-1]["seconds"] if isinstance(r, list) else r)


def worker(case: dict[str, Any], folder: str) -> None:
    """One rank of a case."""
    import torch

    from entprune_ds import comm

    torch.set_num_threads(1)
    comm.init(timeout_seconds=300)
    found = rank_resizes(case, folder) if case in RESIZES else rank_peak(case, folder)
    Path(folder, f"result_{comm.rank()}").write_text(json.dumps(found))
    comm.barrier()
    os._exit(0)


def estimated(case: dict[str, Any], constants: dict[str, Any]) -> int:
    """Bytes of the largest pipeline stage, as --dry-run prints them."""
    from entprune_ds.estimate import rank_memory

    with tempfile.TemporaryDirectory() as folder:
        return max(m.total for m in rank_memory(config_of(case, folder), case["world_size"], constants))


def estimated_resize(case: dict[str, Any], before: Iterable[int], constants: dict[str, Any]) -> Any:
    """The estimate for a removal of a RESIZES case."""
    from entprune_ds.estimate import evenly, removal_estimate

    config, blocks = config_of(case, ""), tuple(before)
    config = replace(config, model=replace(config.model, kept_blocks=blocks))
    return removal_estimate(config, case["world_size"], evenly(blocks, len(blocks) // 4), constants)


def removal_seconds(case: dict[str, Any], before: Iterable[int], constants: dict[str, Any]) -> float:
    """The estimated time alone."""
    return estimated_resize(case, before, constants).seconds


def compared(case: dict[str, Any], found: Any, constants: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of measured and estimated figures with their relative error."""
    if case not in RESIZES:
        guess = estimated(case, constants)
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
    rates = {name: {"replicated": 0.0, "sharded": 0.0} for name in STAGES}
    kinds = [f"zero{stage}" for stage in range(4)] + ["pipeline"]
    resize: dict[str, Any] = {name: {"seconds": 0.0, "seconds_per_parameter": 0.0} for name in kinds}
    return {"memory": {"activations": 1.0, "buffers": rates}, "resize": resize | {"seconds_per_byte": 0.0}}


def fit(measured: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """Constants with the least squares of the relative errors; none is negative. Estimates are linear in them."""
    constants = blank()
    memory, resize = constants["memory"], constants["resize"]
    kinds = {name: ("sharded",) if name.startswith("zero0") else ("replicated", "sharded") for name in STAGES}
    rates = [(memory["buffers"][name], kind) for name in STAGES for kind in kinds[name]]  # ZeRO-0: nothing is sharded
    peaks = [(partial(estimated, case, constants), found) for case, found in measured if case in FITTED]
    _solve([(memory, "activations"), *rates], peaks)
    costs = [(resize[name], kind) for name in resize if name != "seconds_per_byte" for kind in resize[name]]
    times = [
        (partial(removal_seconds, case, removal["before"], constants), removal["seconds"])
        for case, found in measured if case in RESIZES for removal in found
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


def all_measured(cases: list[dict[str, Any]], path: Path | None) -> list[tuple[dict[str, Any], Any]]:
    """(case, measurement) of all cases; those that the file at `path` holds already are taken from there."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    found = []
    for case in cases:
        old = [m for c, m in known if c == case]
        found.append((case, old[-1] if old else measure(case)))
        print(f"{len(found)} of {len(cases)}: {json.dumps(case)}", file=sys.stderr, flush=True)
        if path and not old:
            with path.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def summary(measured: list[tuple[dict[str, Any], Any]], constants: dict[str, Any]) -> dict[str, Any]:
    """All rows, and the largest errors."""
    rows = {kind: [row for case, found in measured if case in cases for row in compared(case, found, constants)]
            for kind, cases in (("held_out", HELD_OUT), ("fitted", FITTED), ("resizes", RESIZES))}  # fmt: skip
    largest = {f"largest_error_{kind}": max((abs(r["error"]) for r in rows[kind]), default=None) for kind in rows}
    return {**largest, **rows}


def main() -> int:
    """Measure, compare, and fit when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--write", action="store_true", help="measure everything, fit the constants and write them")
    parser.add_argument("--all", action="store_true", help="compare the cases of the fit and the resizes too")
    parser.add_argument("--measured", type=Path, help="file that keeps measurements, to go on after an interruption")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from entprune_ds.estimate import CONSTANTS, load_constants

    if options.case:
        worker(json.loads(options.case), options.folder)
    cases = [*HELD_OUT, *FITTED, *RESIZES] if options.write or options.all else HELD_OUT
    measured = all_measured(cases, options.measured)
    constants = fit(measured) if options.write else load_constants()
    found = summary(measured, constants)
    if options.write:
        facts = {"held_out_cases": len(HELD_OUT), "largest_error": found["largest_error_held_out"]}
        constants = {"measured": machine() | facts, **constants}
        CONSTANTS.write_text(json.dumps(constants, indent=2) + "\n")
    print(json.dumps(found, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
