"""What monitoring costs: (step + monitoring) / step, on two ranks of this machine with W&B offline.

Blocks of `monitor.log_every` steps are trained in turn without and with monitoring, on the digits model. In a pair

    ratio = (seconds of the steps without + seconds inside monitoring calls) / seconds of the steps without

where monitoring calls are the log of the block, its share of the norms and gates of the blocks of the model
(`monitor.blocks_every`), and the clock around the parts of a step. `wall` compares the two blocks themselves, and so
also what the W&B thread takes from the training. Medians over the pairs, with a bootstrap interval of 95 %.

  python tools/bench_monitor.py --json      two idle cores, a few minutes
  python tools/bench_monitor.py --pairs 5   faster, with a wider interval
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.local_ranks import on_ranks  # noqa: E402

WORLD_SIZE = 2
TINY = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=16"]


def measure(folder: str, pairs: int, settings: list[str]) -> dict[str, Any]:
    """Train pairs of blocks in this job; figures of rank 0. Collective.

    Args:
        folder: empty, for the run.
        pairs: to measure.
        settings: KEY=VALUE beside those of preset=digits.
    """
    from entprune_ds import comm
    from entprune_ds.config import MonitorConfig, load_config
    from entprune_ds.data.builtin import write_digits
    from entprune_ds.engine.build import destroy_engine
    from entprune_ds.run_state import open_run

    os.environ["WANDB_MODE"] = "offline"
    if comm.is_main():
        write_digits(Path(folder) / "digits", shard_size=64, seed=0)
    comm.barrier()
    words = ["preset=digits", f"data.shards={folder}/digits/train", f"run.root={folder}", "run.name=bench"]
    config = load_config([*words, "train.num_steps=1000000", "train.validate_every=0", *settings])
    defaults = MonitorConfig()
    config = replace(config, monitor=replace(defaults, blocks_every=1))  # measured in every pair, counted by its share
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    run = open_run(config, words)
    found = [pair(run, plain_first=bool(i % 2)) for i in range(-1, pairs)][1:]  # the first one warms up
    clock = seconds_of_clock(run) * defaults.log_every
    waiting = [*run.monitor.client.dropped] if comm.is_main() else []
    run.monitor.finish()
    run.stream.close()
    destroy_engine(run.engine)
    share = defaults.log_every / defaults.blocks_every
    monitoring = [f["log"] + f["blocks"] * share + clock for f in found]
    ratios = [(f["plain"] + m) / f["plain"] for f, m in zip(found, monitoring, strict=True)]
    walls = [f["monitored"] / f["plain"] for f in found]
    median = statistics.median
    return {
        "ratio": median(ratios), "interval": bootstrap(ratios),
        "wall": median(walls), "wall_interval": bootstrap(walls),
        "step_ms": 1e3 * median(f["plain"] for f in found) / defaults.log_every,
        "log_ms": 1e3 * median(f["log"] for f in found), "blocks_ms": 1e3 * median(f["blocks"] for f in found),
        "clock_ms_per_step": 1e3 * clock / defaults.log_every, "log_every": defaults.log_every,
        "blocks_every": defaults.blocks_every, "pairs": pairs, "world_size": comm.world_size(),
        "depth": config.model.depth, "hidden_size": config.model.hidden_size, "wandb": "offline", "dropped": waiting,
    }  # fmt: skip


def pair(run: Any, plain_first: bool) -> dict[str, float]:
    """Seconds of a block without monitoring, of one with it, and of the calls inside the latter. Collective."""
    seconds: dict[str, float] = {}
    for kind in ("plain", "monitored") if plain_first else ("monitored", "plain"):
        seconds |= block(run, kind == "monitored")
    return seconds


def block(run: Any, monitored: bool) -> dict[str, float]:
    """monitor.log_every steps, and the log after them where it is wanted. Collective."""
    from entprune_ds import comm
    from entprune_ds.config import MonitorConfig
    from entprune_ds.logs import ProgressLine
    from entprune_ds.run_view import log_step
    from entprune_ds.step_metrics import log_blocks
    from entprune_ds.trainer import one_step

    every = run.config.monitor.log_every
    steps = timed(lambda: [one_step(run) for _ in range(every)][-1])
    line = ProgressLine("bench", total=0)
    with without_clock(run) if not monitored else _as_it_is():
        seconds, loss = steps()
    if not monitored:
        return {"plain": seconds}
    log, _ = timed(lambda: log_step(run, loss, line))()
    blocks, _ = timed(lambda: log_blocks(run))()
    comm.barrier()
    share = every / MonitorConfig().blocks_every
    return {"monitored": seconds + log + blocks * share, "log": log, "blocks": blocks}


def timed(call: Callable[[], Any]) -> Callable[[], tuple[float, Any]]:
    """A call that returns its seconds too; all ranks begin together, so that no wait for a step counts."""
    from entprune_ds import comm

    def inner() -> tuple[float, Any]:
        comm.barrier()
        start = time.perf_counter()
        value = call()
        return time.perf_counter() - start, value

    return inner


@contextmanager
def without_clock(run: Any) -> Iterator[None]:
    """Steps whose parts nobody times."""
    parts = run.engine.parts
    parts.part = lambda name: _as_it_is()
    try:
        yield
    finally:
        del parts.part


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def seconds_of_clock(run: Any, repeats: int = 2000) -> float:
    """Seconds that the clock around its parts adds to a step: entries in a step x time of one. Collective."""
    from entprune_ds.engine.step_parts import StepParts
    from entprune_ds.trainer import one_step

    parts, entries = run.engine.parts, 0

    def counting(name: str) -> Any:
        nonlocal entries
        entries += 1
        return StepParts.part(parts, name)

    parts.part = counting
    one_step(run)
    del parts.part
    own, times = StepParts(parts.cuda), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            with own.part("data"):
                pass
        times.append((time.perf_counter() - start) / repeats)
    return entries * min(times)


def bootstrap(values: list[float], draws: int = 2000) -> list[float]:
    """95 % interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=25, help="pairs of blocks of steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that this works, not what it costs")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // WORLD_SIZE), help="per rank")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        from entprune_ds import comm
        from entprune_ds.cli.common import leave

        comm.init(timeout_seconds=300)
        found = measure(options.folder, options.pairs, TINY if options.tiny else [])
        if comm.is_main():
            Path(options.folder, "result").write_text(json.dumps(found))
        comm.barrier()
        comm.shutdown()
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        found = on_ranks(command, WORLD_SIZE, options.threads, Path(folder, "result"), 1800)
    if options.json:
        print(json.dumps(found))
    else:
        low, high = found["interval"]
        print(f"(step + monitoring) / step = {found['ratio']:.4f}, 95 % interval {low:.4f} to {high:.4f}")
        print("\n".join(f"  {name}: {value}" for name, value in found.items() if name not in ("ratio", "interval")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
