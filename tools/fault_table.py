"""What faults cost: every row hits a real training on two ranks, and its end is compared with that of a whole one.

  python tools/fault_table.py                            all rows, and docs/FAULTS.md
  python tools/fault_table.py "the disk is full" ...     some rows, printed only

The seconds are those of this machine, most of them the start of a Python with DeepSpeed in every process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.fault_node import kill_node  # noqa: E402
from tools.fault_rows import HIT, Bench, Row  # noqa: E402
from tools.fault_rows import ROWS as ONE_NODE  # noqa: E402
from tools.trials import STEPS, Unavailable  # noqa: E402

ROWS = ONE_NODE | {"a node dies": kill_node}
PAGE = """\
# Faults

Every row is a real training (deepspeed launcher, two ranks on the CPU, {steps} steps, two removals, a checkpoint every
10 steps) that is hit after step {hit}, mended where there is something to mend, and started again by the same command.
At its end weights, both moments, EMA, losses of all steps and decisions are compared with those of a run that nothing
happened to: identical to the bit in every row (the row of the loss: with a run of the same data). So nothing is lost
but the time in which steps since the last checkpoint are repeated.

*Detect* is the time from the fault to the end of the job, or to the line that tells. *Recover* is the time from the
same command to the first step beyond the one reached before, most of it the start of Python and DeepSpeed.

{table}

Measured on {date} at commit {commit} by `python tools/fault_table.py`. Each row is a test as well
(`tests/test_fault_table.py`).

## What watches a run

- **A rank that stands still** for `run.timeout_seconds` (monotonic clock; a step, a collective or an evaluation of a
  sampler is progress) writes the stacks of all its threads to `stacks/rank_NNNNN.txt` in the run folder, says so with
  its host, and ends with status 75; so do the ranks that wait for it.
- **Bad steps.** A step whose mean loss over the global batch is NaN or infinite, whose gradient norm is, or whose loss
  lies `train.spike_deviations` running deviations above the running mean, is left out on all ranks together, at every
  ZeRO stage and on pipelines: weights, moments, EMA and Adam's step count stay as they are, to the bit; the data go on.
  The mean remembers 100 good steps, and no leap is looked for in the first 50 after the start or a change of the model.
  `bad_steps.jsonl` in the run folder names step, reason, ranks, shards and examples; `train/skipped_steps` counts.
- **Roll-back.** After `train.bad_steps` of them in a row the run goes back, in its processes, to the newest checkpoint
  from before the first of them. The data do not go back: the next batch is the one after the bad stretch. All of this
  follows from the checkpoint and the data, so a run that is killed meanwhile and started again does the same. Later
  checkpoints move to `checkpoints/superseded_N`. After `train.max_rollbacks` the run stops with a report (status 2).
- **Slow ranks.** Every `monitor.slow_every` steps the logged time split is compared over the ranks: wait for data,
  communication (waiting for others included), computing. `ranks/*` in the metrics has medians and maxima; a rank that
  takes `monitor.slow_factor` times what the median rank takes, communication apart, is told with its host and the
  likely cause.
"""
HEAD = ["fault", "what is sent", "detect (s)", "recover (s)", "lost", "what happens"]


def line(name: str, row: Row) -> list[str]:
    """The cells of one row."""
    detect = "at once" if row.detect is None else f"{row.detect:.1f}"
    recover = "goes on" if row.recover is None else f"{row.recover:.1f}"
    return [name, row.sent, detect, recover, f"nothing; {row.repeated} steps repeated", row.then]


def table(lines: list[list[str]]) -> str:
    """The lines in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEAD, ["---"] * len(HEAD), *lines])


def commit() -> str:
    """Short commit of the working tree, with a mark when it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def main(names: list[str]) -> int:
    """Run the rows; returns the exit status."""
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"error: no row {', '.join(map(repr, unknown))}. There are: {', '.join(ROWS)}.", file=sys.stderr)
        return 2
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        bench = Bench(Path(folder))
        for name in names or ROWS:
            try:
                lines.append(line(name, ROWS[name](bench)))
            except Unavailable as problem:
                lines.append([name, "", "", "", "", f"not run here: {problem}"])
            except AssertionError as problem:
                failed += 1
                lines.append([name, "", "", "", "", "FAILED"])
                print(f"{name}: {problem}", file=sys.stderr)
                traceback.print_exc()
            print(" | ".join(lines[-1]), flush=True)
    print(table(lines))
    if not names and not failed:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        page = PAGE.format(steps=STEPS, hit=HIT, table=table(lines), date=date, commit=commit())
        (ROOT / "docs" / "FAULTS.md").write_text(page)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
