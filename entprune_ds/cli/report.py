"""`entprune-ds report RUN [RUN ...]`: one self-contained page about a run, or several runs side by side."""

from __future__ import annotations

import sys
from pathlib import Path

from entprune_ds.cli.common import one_line

HELP = """usage: entprune-ds report RUN
       entprune-ds report RUN RUN [RUN ...] [out=FILE]

Writes RUN/report.html from the files of a run folder: samples before and after, depth over time, losses,
block scores, the vote of every check, where the time of a step goes, speed and memory, what every block does,
quality and latency with their protocol, and how to reproduce the run.
With several runs it writes one page that compares them: final figures, curves over each other, the settings that
differ, decisions side by side, last samples.
The page is self-contained: one file, no scripts, no requests. Missing files are named in it, not an error.

  RUN       run folder, such as runs/demo
  out=FILE  the comparison; default: comparison.html beside the first run

examples:  entprune-ds report runs/demo
           entprune-ds report runs/ced runs/taylor out=ced_or_taylor.html
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
    outs = [w.removeprefix("out=") for w in words if w.startswith("out=")]
    runs = [Path(w) for w in words if not w.startswith("out=")]
    if not runs or any(w.startswith("-") for w in words):
        raise ValueError(f"expected run folders, got {' '.join(words) or 'nothing'}. See --help.")
    for run_dir in runs:
        if run_dir.is_dir() and not any((run_dir / name).exists() for name in RUN_FILES):
            raise ValueError(f"{run_dir} is not a run folder: it holds none of {', '.join(RUN_FILES)}.")
    if len(runs) == 1:
        if outs:
            raise ValueError("`out` is for several runs; the report of one lies in its folder. Leave it out.")
        from ..monitor.report import build_report  # late, so that --help answers at once

        return build_report(runs[0])
    from ..monitor.runs_page import COMPARISON_FILE, build_comparison

    out = Path(outs[-1]) if outs else runs[0].parent / COMPARISON_FILE
    if out.suffix != ".html":
        raise ValueError(f"`out` must end in .html, got {out}. Choose another name.")
    return build_comparison(runs, out)


if __name__ == "__main__":
    sys.exit(main())
