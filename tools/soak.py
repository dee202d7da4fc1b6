"""Half an hour of random kills: two ranks, four removals, and at its end the same state as without any of it.

  python tools/soak.py                      30 minutes; writes docs/SOAK.md
  python tools/soak.py --minutes 3 --least 20 --most 40 --out build/SOAK.md

Every 1 to 3 minutes one rank, drawn at random, gets a SIGKILL; the same command starts the job again. When the time is
over the last start is told where to stop (train.stop_step), and a second run goes there with nothing happening to it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from entprune_ds.data.builtin import write_digits  # noqa: E402
from tools.fault_table import commit  # noqa: E402
from tools.trials import Trial, assert_same_end, killed_at_the_end  # noqa: E402

EVERY = 20
"""Steps between checkpoints."""
LOOK = 1.0
"""Seconds between two looks at the memory."""
GROWTH = 1.05
"""Memory is flat when no life ends with more than this times what it held after its first step."""
SETTINGS = [
    "train.num_steps=1000000", f"train.checkpoint_every={EVERY}", "monitor.log_every=1", "model.depth=8",
    "prune.target_depth=4", "prune.num_checks=4",
]  # fmt: skip


@dataclass
class Life:
    """One start of the job, to its end."""

    first: int
    """Step that was logged before it."""
    last: int = 0
    """Last step that it logged."""
    seconds: float = 0.0
    victim: int | None = None
    """Rank that was killed; None for the last life."""
    memory: list[float] = field(default_factory=list)
    """MiB that both ranks held, from the first step on."""

    @property
    def growth(self) -> float:
        """Memory at the end over memory after the first step; 1 without a step."""
        few = min(5, len(self.memory))
        return sum(self.memory[-few:]) / sum(self.memory[:few]) if few else 1.0


def look(trial: Trial, life: Life) -> None:
    """Note steps and memory."""
    life.last = max(life.last, trial.reached())
    if life.last > life.first:
        found = [rss(pid) for pid in trial.ranks]
        if all(found):
            life.memory.append(sum(found))


def rss(pid: int) -> float:
    """MiB of a process, 0 when it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def live(trial: Trial, until: Callable[[], bool]) -> Life:
    """Start the command and look at it until it ends, or `until` says so."""
    assert trial.process is None or trial.process.poll() is not None
    life, start = Life(first=trial.reached()), trial.start()
    assert trial.process is not None
    while trial.process.poll() is None and not until():
        look(trial, life)
        time.sleep(LOOK)
    life.seconds = time.monotonic() - start
    return life


def soak(root: Path, minutes: float, seed: int, least: float, most: float) -> tuple[list[Life], Life, int]:
    """The lives of the run that is hit, the one life of the run that is not, and the step at which both end.

    Raises:
        AssertionError: when the states differ, memory grows, or a life ends in another way than it should.
    """
    data, draw, end_step = root / "data", random.Random(seed), max(40, int(100 * minutes))
    write_digits(data, shard_size=64, seed=0)
    settings = [*SETTINGS, f"prune.end_step={end_step}"]
    trial, lives = Trial(root, "soak", data, *settings), list[Life]()
    end = time.monotonic() + 60 * minutes
    with killed_at_the_end(trial):
        while time.monotonic() < end:
            strike = time.monotonic() + draw.uniform(least, most)
            life = live(trial, lambda at=strike: time.monotonic() >= at and len(trial.ranks) == 2)
            life.victim = draw.randrange(2)
            os.kill(trial.ranks[life.victim], signal.SIGKILL)
            assert trial.wait_end(120) != 0, "the job has outlived its rank"
            life.last = max(life.last, trial.reached())
            lives.append(life)
            print(f"life {len(lives)}: to step {life.last}, rank {life.victim} killed", flush=True)
        stop = (max(trial.reached(), end_step) // EVERY + 1) * EVERY
        trial.words.append(f"train.stop_step={stop}")
        lives.append(finished(trial))
    whole = Trial(root, "whole", data, *settings, f"train.stop_step={stop}")
    with killed_at_the_end(whole):
        undisturbed = finished(whole)
    assert_same_end(trial, whole, stop)
    assert len(trial.removals()) == 4, trial.removals()
    grown = [round(life.growth, 3) for life in [*lives, undisturbed] if life.growth > GROWTH]
    assert not grown, f"memory has grown: {grown}"
    return lives, undisturbed, stop


def finished(trial: Trial) -> Life:
    """The life that ends by itself."""
    life = live(trial, lambda: False)
    assert trial.wait_end(120) == 0, trial.text[-3000:]
    life.last = trial.reached()
    return life


def page(lives: list[Life], whole: Life, stop: int, words: str) -> str:
    """docs/SOAK.md."""
    rows = ["| start | steps | seconds | ended by | memory after the first step (MiB) | at its end (MiB) | ratio |"]
    rows.append("|---" * 7 + "|")
    names = [str(i) for i in range(1, len(lives) + 1)] + ["undisturbed"]
    for name, life in zip(names, [*lives, whole], strict=True):
        how = "its end" if life.victim is None else f"SIGKILL to rank {life.victim}"
        few = life.memory[:5], life.memory[-5:]
        held = [f"{sum(part) / len(part):.0f}" if part else "-" for part in few]
        steps = f"{life.first} to {life.last}"
        rows.append(f"| {name} | {steps} | {life.seconds:.0f} | {how} | {held[0]} | {held[1]} | {life.growth:.3f} |")
    kills, spent = sum(life.victim is not None for life in lives), sum(life.seconds for life in lives)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"""\
# Soak

Two ranks on the CPU train the digits model and remove four blocks while one of them, drawn at random, is killed again
and again (SIGKILL); the same command starts the job each time. {kills} kills in {spent / 60:.1f} minutes, {stop} steps.
At the end weights, moments, EMA, the losses of all {stop} steps and the decisions are identical, to the bit, with those
of an undisturbed run. Memory is what both ranks hold together (mean of five looks); in no life did it grow by more than
{100 * (GROWTH - 1):.0f} %.

{chr(10).join(rows)}

Measured on {date} at commit {commit()} by `python tools/soak.py{words}`.
"""


def main(argv: list[str]) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="time of the kills")
    parser.add_argument("--least", type=float, default=60.0, help="seconds between two kills, at least")
    parser.add_argument("--most", type=float, default=180.0, help="and at most")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the ranks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "SOAK.md", help="where the table goes")
    asked = parser.parse_args(argv)
    if not 0 < asked.least <= asked.most or asked.minutes <= 0:
        parser.error("--minutes and --least must be above 0, and --most at least --least")
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        found = soak(Path(folder), asked.minutes, asked.seed, asked.least, asked.most)
    text = page(*found, words="".join(f" {word}" for word in argv))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
