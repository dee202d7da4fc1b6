"""`make demo`: the whole job on real digits with the commands of the README, timed phase by phase.

Writes runs/demo/summary.json and runs/demo/report.html. Each phase is resumable: an interrupted demo goes on
where it stopped when it is started again; --fresh starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import entprune_ds

BIN = Path(sys.executable).parent
BASE, RUN, DATA = "runs/demo_base", "runs/demo", "data_digits"
BUDGET = 600
BARS = (  # what the demo is expected to reach: (name, how to read it from summary.json, comparison, bound)
    ("base: class accuracy", lambda s: s["base"]["class_accuracy"], ">=", 0.95),
    ("base: FID", lambda s: s["base"]["fid"], "<=", 10.0),
    ("pruned: depth", lambda s: s["pruned"]["depth"], "<=", 4),
    ("pruned: class accuracy", lambda s: s["pruned"]["class_accuracy"], ">=", 0.95),
    ("pruned: FID", lambda s: s["pruned"]["fid"], "<=", 12.0),
    ("speed-up at batch 64", lambda s: s["speedup"]["64"], ">=", 1.8),
    ("resizes", lambda s: s["resizes"], ">=", 2),
    ("total seconds", lambda s: s["total_seconds"], "<=", BUDGET),
)


def phases(num_ranks: int, extra: list[str]) -> list[tuple[str, int, list[str], Path]]:
    """(name, budget in seconds, command, file that is there when it is done)."""
    entprune = str(BIN / "entprune-ds")
    launch = [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--module", "entprune_ds.cli.train"]
    base = [f"data.shards={DATA}/train", "run.name=demo_base", *extra]
    pruned = [f"data.shards={DATA}/train", "run.name=demo", f"model.weights={BASE}/model", *extra]
    base_samples = Path(RUN, "samples", "base_final.npz")
    evaluate = [
        entprune, "evaluate", f"run={RUN}", f"evaluate.baseline={BASE}/model",
        f"evaluate.samples={RUN}/samples/final.npz", f"evaluate.baseline_samples={base_samples}",
    ]  # fmt: skip
    return [
        ("shards", 15, [entprune, "shards", "preset=digits", f"out={DATA}"], Path(DATA, "val", "index.json")),
        ("base model", 290, [*launch, "preset=digits", *base], Path(BASE, "model", "config.json")),
        ("prune 8 -> 4", 190, [*launch, "preset=digits_prune", *pruned], Path(RUN, "model", "config.json")),
        ("samples, base", 30, [entprune, "sample", f"run={BASE}", f"out={base_samples}"], base_samples),
        ("samples, pruned", 20, [entprune, "sample", f"run={RUN}"], Path(RUN, "samples", "final.npz")),
        ("evaluate", 40, evaluate, Path(RUN, "evaluation.json")),
        ("report", 10, [entprune, "report", RUN], Path(RUN, "report.html")),
    ]  # fmt: skip


def main() -> int:
    """Run every phase that is not done yet; returns the exit status of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="delete the results of an earlier demo first")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 when a figure misses its bar")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training (default 2)")
    parser.add_argument("settings", nargs="*", help="key=value settings passed to both trainings")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code_file, code = Path(RUN, "code.txt"), code_digest()
    if not options.fresh and code_file.is_file() and code_file.read_text() != code:
        print(f"== note: {RUN} was made by other code. Phases done before stay; --fresh starts over.", flush=True)
    if options.fresh:
        for folder in (BASE, RUN, DATA):
            shutil.rmtree(folder, ignore_errors=True)
    if not code_file.is_file():
        code_file.parent.mkdir(parents=True, exist_ok=True)
        code_file.write_text(code)
    times_file, times = Path(RUN, "phases.json"), {}
    if times_file.is_file():
        times = json.loads(times_file.read_text())
    for name, budget, command, done in phases(options.ranks, options.settings):
        if done.is_file():
            print(f"== {name}: done before ({done})", flush=True)
            continue
        words = " ".join([Path(command[0]).name, *command[1:]])
        print(f"== {name} (budget {budget} s): {words}", flush=True)
        start = time.monotonic()
        try:
            status = run(command)
        except KeyboardInterrupt:
            print(f"interrupted in phase `{name}`; the same command goes on from here.", file=sys.stderr)
            return 130
        finally:  # an interrupted phase goes on later: its times add up
            times[name] = times.get(name, 0.0) + time.monotonic() - start
            times_file.write_text(json.dumps(times))
        if status:
            message = f"error: phase `{name}` ended with status {status}; the same command goes on from here."
            print(message, file=sys.stderr)
            return status
        print(f"== {name}: {times[name]:.1f} s of {budget} s", flush=True)
    summary = summarize(times)
    Path(RUN, "summary.json").write_text(json.dumps(summary, indent=2))
    subprocess.run([str(BIN / "entprune-ds"), "report", RUN], check=True, stdout=subprocess.DEVNULL)
    show(times, options.ranks)
    missed = show_bars(summary)
    print(f"summary: {RUN}/summary.json\nreport:  {Path(RUN, 'report.html').resolve()}")
    return int(options.strict and bool(missed))


def run(command: list[str]) -> int:
    """Exit status of a command; it ends with us, launcher and ranks included, when we are interrupted."""
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait(60)
        raise


def code_digest() -> str:
    """SHA-256 of the package's source and presets."""
    root = Path(entprune_ds.__file__).parent
    files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml", ".json"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def summarize(times: dict[str, float]) -> dict[str, Any]:
    """summary.json: what was measured, from evaluation.json, metrics.jsonl and the phase times."""
    figures = json.loads(Path(RUN, "evaluation.json").read_text())
    metrics = [json.loads(line) for line in Path(RUN, "metrics.jsonl").read_text().splitlines()]

    def last_by_step(name: str) -> list[float]:
        return list({m["step"]: m[name] for m in metrics if name in m}.values())

    resize = last_by_step("prune/resize_seconds")
    score = zip(last_by_step("prune/score_seconds"), last_by_step("prune/vote_seconds"), strict=True)
    return {
        "base": figures["base"], "pruned": figures["pruned"], "speedup": figures["speedup"],
        "resizes": len(resize), "resize_seconds": resize, "score_seconds": [sum(parts) for parts in score],
        "phase_seconds": times, "total_seconds": sum(times.values()), "protocol": figures["protocol"],
    }  # fmt: skip


def show_bars(summary: dict[str, Any]) -> list[str]:
    """Print every figure beside its bar; returns the names of those that miss it."""
    missed = []
    for name, read, comparison, bound in BARS:
        value = read(summary)
        if not (value >= bound if comparison == ">=" else value <= bound):
            missed.append(name)
        print(f"  {'MISSED' if name in missed else 'ok':7}{name}: {value:.4g} ({comparison} {bound:g})")
    return missed


def show(times: dict[str, float], num_ranks: int) -> None:
    """The closing tables."""
    from rich.console import Console
    from rich.table import Table

    from entprune_ds.cli.evaluate import show as show_figures

    table = Table(title="time")
    for column in ("phase", "seconds", "budget"):
        table.add_column(column, justify="right" if column != "phase" else "left")
    for name, budget, _, _ in phases(num_ranks, []):
        table.add_row(name, f"{times.get(name, 0):.1f}", str(budget))
    table.add_row("total", f"{sum(times.values()):.1f}", str(BUDGET))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    show_figures(json.loads(Path(RUN, "evaluation.json").read_text()))


if __name__ == "__main__":
    sys.exit(main())
