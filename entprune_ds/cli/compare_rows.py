"""The finished rows of a comparison as plain values: what compare.json holds and the tables are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entprune_ds.cli.compare_plan import Row, Study
from entprune_ds.config import CompareConfig

FIGURES = ("fid", "kid", "class_accuracy", "val_loss")
COSTS = ("steps", "macs", "macs_training", "macs_scoring")
Read = Callable[[str], dict[str, Any]]
"""read(name of a row) -> its result, empty where there is none."""
PlainRow = dict[str, Any]


def plain_rows(study: Study, compare: CompareConfig, read: Read) -> list[PlainRow]:
    """Every finished row of a study: its figures at equal compute (or at recovery_steps), and others below them."""
    found = []
    for contestant, rows in study.contestants.items():
        found += [r for row in rows if (r := plain_row(contestant, row, compare, read(row.name))) is not None]
    return found


def plain_row(contestant: str, row: Row, compare: CompareConfig, result: dict[str, Any]) -> PlainRow | None:
    """One row of compare.json, or None while it is not finished."""
    stops = result.get("stops", {})
    main = result.get("equal_step") if compare.equal_compute else compare.recovery_steps
    needed = {str(main), str(compare.recovery_steps), *([str(compare.long_steps)] if row.long else [])}
    if not needed <= set(stops) or "latency_ms" not in result:
        return None
    figures, batches = stops[str(main)], result["latency_ms"]
    plain = {"criterion": contestant, "seed": row.seed, "target_depth": row.target_depth}
    plain |= {key: figures[key] for key in FIGURES} | {"damage": result["damage"]}
    plain |= {"latency_ms": next(iter(batches.values())), "score_seconds": result["score_seconds"]}
    plain |= {"kept_blocks": result["kept_blocks"], "depths": result["depths"]} | {k: figures[k] for k in COSTS}
    plain["macs_budget"] = result.get("macs_budget")
    plain |= {"latency_ms_by_batch": batches, "speedup_by_batch": result["speedup"]}
    plain |= {"memorisation": figures["memorisation"], "probes": result["probes"]}
    plain["equal_steps"] = {k: stops[str(compare.recovery_steps)][k] for k in (*FIGURES, *COSTS)}
    if row.long:
        plain["long"] = {k: stops[str(compare.long_steps)][k] for k in (*FIGURES, *COSTS)}
    if row.samplings:
        plain["samplings"] = {s: v["fid"] for s, v in result["samplings"].items()}
    return plain


def at_equal_steps(rows: Sequence[PlainRow]) -> list[PlainRow]:
    """The same rows with their figures at compare.recovery_steps."""
    return [row | row["equal_steps"] for row in rows]


def by_contestant(rows: Sequence[PlainRow]) -> dict[str, list[PlainRow]]:
    """{contestant: its rows by seed}, lowest mean FID first."""
    groups: dict[str, list[PlainRow]] = {}
    for row in rows:
        groups.setdefault(row["criterion"], []).append(row)
    return dict(sorted(groups.items(), key=lambda item: sum(r["fid"] for r in item[1]) / len(item[1])))


def fid_by_seed(rows: Sequence[PlainRow]) -> dict[int, float]:
    """{seed: FID} of a contestant."""
    return {row["seed"]: row["fid"] for row in rows}


def out_files(out: Path) -> dict[str, Path]:
    """What the command writes."""
    names = {"json": "compare.json", "studies": "compare_studies.json", "text": "compare.md", "latex": "compare.tex"}
    return {kind: out / name for kind, name in names.items()}
