"""`make test-full`: every test with all rows of the matrices, one file at a time; resumable; prints a table.

Results are kept in build/test_full.json by test file and commit, so an interrupted run goes on where it stopped.
--fresh starts over. The closing table goes to docs/TEST_FULL.md, with date and commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
STATE, TABLE = ROOT / "build" / "test_full.json", ROOT / "docs" / "TEST_FULL.md"


def commit() -> str:
    """Short commit of the working tree, with a mark when it has changes."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    changed = [line for line in status.splitlines() if not line.endswith("docs/TEST_FULL.md")]
    return head + ("+changes" if changed else "")


def run_file(path: Path) -> dict[str, float | int | str]:
    """Run one test file; returns its counts and seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    if result.returncode:
        print(result.stdout[-6000:], result.stderr[-2000:], sep="\n", flush=True)
    return {"status": result.returncode, "seconds": round(time.monotonic() - start, 1), **counts}


def main() -> int:
    """Run what has no result for this commit yet; returns 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget the results of an interrupted run")
    parser.add_argument("files", nargs="*", help="only these, e.g. test_resize.py; the rest is for another call")
    options = parser.parse_args()
    now = commit()
    known = json.loads(STATE.read_text()) if STATE.is_file() and not options.fresh else {}
    same = known.get("commit") == now and not now.endswith("+changes")
    results = known.get("results", {}) if same else {}
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    for path in [p for p in paths if p.name in options.files or not options.files]:
        if results.get(path.name, {}).get("status") != 0:
            print(f"== {path.name}", flush=True)
            results[path.name] = run_file(path)
            STATE.parent.mkdir(exist_ok=True)
            STATE.write_text(json.dumps({"commit": now, "results": results}))
            print(f"   {results[path.name]}", flush=True)
    text = table(now, results, len(paths))
    TABLE.write_text(text)
    print(text)
    failed = sum(int(r.get("failed", 0)) + int(r.get("error", 0)) for r in results.values())
    print(f"{sum(int(r.get('passed', 0)) for r in results.values())} passed, {failed} failed")
    return int(any(r["status"] for r in results.values()))


def table(now: str, results: dict, total: int) -> str:
    """The result as Markdown; says so when some of the `total` files have none."""
    part = "" if len(results) == total else f" {len(results)} of {total} files; the others were not run at this commit."
    lines = [
        "# Full test matrix",
        "",
        f"`make test-full`, {datetime.now(UTC):%Y-%m-%d}, commit {now}, 2 CPU cores.{part}",
        "",
    ]
    lines += ["| file | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for name, r in sorted(results.items()):
        bad = int(r.get("failed", 0)) + int(r.get("error", 0))
        lines.append(f"| {name} | {r.get('passed', 0)} | {bad} | {r.get('skipped', 0)} | {r['seconds']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
