"""`entprune-ds report RUN`: write RUN/report.html, one self-contained page about a run."""

from __future__ import annotations

import sys
from pathlib import Path

from entprune_ds.cli.common import one_line

HELP = """usage: entprune-ds report RUN

Writes RUN/report.html from the files of a run folder: samples before and after, depth over time, losses,
block scores, the vote of every check, quality and latency with their protocol, and how to reproduce the run.
The page is self-contained: one file, no scripts, no requests. Missing files are named in it, not an error.

  RUN      run folder, such as runs/demo

example:   entprune-ds report runs/demo
"""
RUN_FILES = ("config.yaml", "env.json", "metrics.jsonl", "decisions.jsonl", "evaluation.json", "summary.json")


def main(argv: list[str] | None = None) -> int:
    """Build the report of one run folder and print its path; 2 after a user error, told on one line."""
    words = sys.argv[1:] if argv is None else argv
    if any(word in ("-h", "--help") for word in words):
        print(HELP, end="")
        return 0
    try:
        print(_build(words))
    except (ValueError, OSError) as error:
        print(f"entprune-ds report: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _build(words: list[str]) -> Path:
    if len(words) != 1 or words[0].startswith("-"):
        raise ValueError(f"expected one run folder, got {' '.join(words) or 'nothing'}. See --help.")
    run_dir = Path(words[0])
    if run_dir.is_dir() and not any((run_dir / name).exists() for name in RUN_FILES):
        raise ValueError(f"{run_dir} is not a run folder: it holds none of {', '.join(RUN_FILES)}.")
    from ..monitor.report import build_report  # late, so that --help answers at once

    return build_report(run_dir)


if __name__ == "__main__":
    sys.exit(main())
