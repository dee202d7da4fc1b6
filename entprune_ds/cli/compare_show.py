"""What a person sees of a comparison: the plan with its time, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from entprune_ds.cli.compare_base import base_path, further_base
from entprune_ds.cli.compare_estimate import WORKER_SECONDS, correction, measure_pace, row_seconds
from entprune_ds.cli.compare_plan import Row
from entprune_ds.cli.compare_row import missing, read_result
from entprune_ds.config import Config, ModelConfig
from entprune_ds.logs import get_logger


def show_plan(config: Config, model: ModelConfig, rows: Sequence[Row]) -> dict[str, float]:
    """Print every row with its estimated seconds, and the sum; returns {row: seconds}."""
    compare, out = config.compare, Path(config.compare.out)
    pace = measure_pace(config, model)
    estimates = {row.name: row_seconds(config, row, model, pace) for row in rows}
    results = {row.name: read_result(out, row.name) for row in rows}
    done = {row.name for row in rows if not missing(row, compare, results[row.name])}
    factor = correction([(estimates[n], results[n]["seconds"]) for n in done])
    estimates = {name: seconds * factor for name, seconds in estimates.items()}
    for row in rows:
        state = f"done in {results[row.name]['seconds']:.0f} s" if row.name in done else f"{estimates[row.name]:.0f} s"
        print(f"  {row.name:32} depth {len(model.blocks)} -> {row.target_depth}  {state}")
    left = sum(estimates[row.name] for row in rows if row.name not in done)
    base = 0.0
    if not base_path(config).is_dir():
        base = compare.base_steps * pace.step(len(model.blocks)) * 0.6  # all cores
        print(f"  base of depth {len(model.blocks)}: {compare.base_steps} steps, about {base:.0f} s")
    seeds = {row.base for row in rows if row.base is not None}
    further = [seed for seed in seeds if not further_base(out, seed).is_dir()]
    if further:
        each = compare.base_steps * pace.step(len(model.blocks))
        print(f"  {len(further)} further bases, {compare.base_steps} steps, about {each:.0f} s each")
        left += each * len(further)
    wall = base + left / compare.workers + WORKER_SECONDS
    how = "from the rows that are done" if done else "from a step and a pass timed now; a measure of its own as a sweep"
    text = f"{len(rows)} rows, {len(done)} done; about {wall / 60:.0f} min with {compare.workers} workers of one thread"
    print(f"{text} ({how}).", flush=True)
    return estimates


class Progress:
    """A line per finished row, with the seconds that are left; rows of other commands in the folder count too."""

    def __init__(self, config: Config, rows: Sequence[Row], estimates: dict[str, float]):
        self.config, self.rows, self.estimates = config, rows, estimates
        self.out, self.failed = Path(config.compare.out), set[str]()
        self.began, self.earlier = time.monotonic(), self._finished()

    def __call__(self, event: str, name: str) -> None:
        """Something happened to a row: start, done, failed or again."""
        if event == "failed":
            self.failed.add(name)
        if event == "start":
            return
        finished = self._finished()
        left = sum(s for n, s in self.estimates.items() if n not in finished | self.failed)
        new = [self.estimates[n] for n in finished - self.earlier]
        workers = self.config.compare.workers
        factor = (time.monotonic() - self.began) * workers / sum(new) if new else 1.0
        said = {"done": "", "failed": " FAILED", "again": " died and is taken up again"}[event]
        counts = f"rows {len(finished)}/{len(self.rows)}"
        get_logger().info("%s  %s%s  %.0f s left", counts, name, said, left * factor / workers)

    def _finished(self) -> set[str]:
        compare = self.config.compare
        return {row.name for row in self.rows if not missing(row, compare, read_result(self.out, row.name))}
