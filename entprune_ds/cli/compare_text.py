"""compare.md and compare.tex: tables and sentences that are computed from the rows, whatever they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entprune_ds.cli.compare_rows import PlainRow, by_contestant, fid_by_seed
from entprune_ds.evaluation.compare import difference, mean_of, rank_correlations
from entprune_ds.monitor.numbers import MISSING, sensible, with_error

CLEAR = 2.0
"""Standard errors beyond which a difference is called one."""

OVER = 1.02
"""Share of the common compute above which a contestant is said to exceed it; stops are whole steps."""


@dataclass(frozen=True)
class Column:
    """A figure of the tables: its title, how it is read from a row, and whether its spread over seeds matters."""

    title: str
    read: Callable[[PlainRow], float]
    spread: bool = True


FIGURES = (
    Column("FID", lambda r: r["fid"]),
    Column("KID x 1000", lambda r: 1000 * r["kid"]),
    Column("class accuracy", lambda r: r["class_accuracy"]),
    Column("validation loss", lambda r: r["val_loss"]),
    Column("damage", lambda r: r["damage"]),
    Column("latency (ms)", lambda r: r["latency_ms"], spread=False),
    Column("checks (s)", lambda r: r["score_seconds"], spread=False),
    Column("steps", lambda r: r["steps"], spread=False),
    Column("TMACs", lambda r: r["macs"] / 1e12, spread=False),
    Column("checks' share of them (%)", lambda r: 100 * r["macs_scoring"] / r["macs"], spread=False),
)


def figure_cells(rows: Sequence[PlainRow], base: PlainRow | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of figures: mean ± standard error over the seeds, lowest FID first."""
    lines = []
    for name, group in by_contestant(rows).items():
        cells = [name, str(len(group))]
        for column in FIGURES:
            mean = mean_of([column.read(r) for r in group])
            cells.append(with_error(mean.value, mean.standard_error) if column.spread else sensible(mean.value))
        lines.append([*cells, "; ".join(sorted({" ".join(map(str, r["kept_blocks"])) for r in group}))])
    if base is not None:
        known = [sensible(base["fid"]), sensible(1000 * base["kid"]), sensible(base["class_accuracy"])]
        latency = sensible(next(iter(base["latency_ms"].values())))
        lines.append(["(base)", "1", *known, *[MISSING] * 2, latency, *[MISSING] * 4, f"all {base['depth']}"])
    return ["", "n", *(c.title for c in FIGURES), "blocks that stay"], lines


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(head), rule, *map(list, lines)])


def latex_table(rows: Sequence[PlainRow]) -> str:
    """The figures as a LaTeX tabular (booktabs), without the blocks."""
    head, lines = figure_cells(rows)
    body = [" & ".join(_latex(cell) for cell in line[:-1]) + r" \\" for line in [head, *lines]]
    columns = "l" + "r" * (len(head) - 2)
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"


def _latex(cell: str) -> str:
    for plain, escaped in (("%", r"\%"), ("_", r"\_"), (" ± ", r" $\pm$ "), ("–", "--"), ("x 1000", r"$\times$ 1000")):
        cell = cell.replace(plain, escaped)
    return cell


def standing(rows: Sequence[PlainRow]) -> str:
    """Who has the lowest FID, how far the others lie behind, in standard errors, and over how many that is clear."""
    groups = by_contestant(rows)
    best, *others = groups
    first = mean_of([r["fid"] for r in groups[best]])
    text = f"Lowest mean FID: **{best}**, {with_error(first.value, first.standard_error)} (n = {first.count})."
    if not others:
        return text
    if first.count < 2:
        return f"{text} One seed: no standard errors."
    lines, clear, paired_clear = [], [], []
    for name in others:
        d = difference(fid_by_seed(groups[best]), fid_by_seed(groups[name]))
        clear += [name] if d.errors_apart > CLEAR else []
        paired_clear += [name] if d.paired_errors_apart > CLEAR else []
        errors = [sensible(v, 2) for v in (d.standard_error, d.errors_apart, d.paired_error, d.paired_errors_apart)]
        lines.append([name, sensible(d.value), *errors])
    head = ["behind the lowest", "FID difference", "standard error", "in standard errors", "paired error", "in these"]
    unclear = [name for name in others if name not in clear]
    text += f" It is ahead of {len(clear)} of {len(others)} by more than {CLEAR:g} standard errors"
    text += f" (of {len(paired_clear)}, paired over the seeds)"
    text += f"; not of {', '.join(unclear)}." if unclear else "."
    return f"{text}\n\n{markdown_table(head, lines)}"


def over_budget(rows: Sequence[PlainRow]) -> str:
    """Contestants that cost more than the common compute, which their checks alone exceed; empty if none does."""
    over = []
    for name, group in by_contestant(rows).items():
        ratio = mean_of([r["macs"] / r["macs_budget"] for r in group]).value
        over += [f"{name} ({ratio:.2f} x)"] if ratio > OVER else []
    return f"Over the common compute as soon as the last check was made: {', '.join(over)}." if over else ""


def margins(rows: Sequence[PlainRow], champion: str) -> str:
    """Where one contestant, the default, stands against each other one; empty if it is not among them or the best."""
    groups = by_contestant(rows)
    if champion not in groups or next(iter(groups)) == champion or len(groups[champion]) < 2:
        return ""
    ahead, behind, level = list[str](), list[str](), list[str]()
    for name, group in groups.items():
        if name != champion:
            apart = difference(fid_by_seed(groups[champion]), fid_by_seed(group)).errors_apart
            (ahead if apart > CLEAR else behind if apart < -CLEAR else level).append(name)
    parts = [(ahead, "ahead of"), (level, f"within {CLEAR:g} of"), (behind, "behind")]
    said = [f"{what} {', '.join(names)}" for names, what in parts if names]
    said_of = f"In standard errors of the FID, **{champion}** is {'; '.join(said)} "
    return said_of + f"(ahead and behind: by more than {CLEAR:g})."


def correlation_table(rows: Sequence[PlainRow], scores: dict[str, dict[str, float]]) -> str:
    """Rank correlation of every score of a keep-set with the FID after a short and a long recovery.

    Args:
        rows: those with "long" count, which are of one seed.
        scores: {contestant: {score: value}}.
    """
    names = list(dict.fromkeys(name for by_score in scores.values() for name in by_score))
    lines = []
    for name in names:
        with_it = [r for r in rows if "long" in r and name in scores.get(r["criterion"], {})]
        values = [scores[r["criterion"]][name] for r in with_it]
        short, long = ([r[which]["fid"] for r in with_it] for which in ("equal_steps", "long"))
        found = [*rank_correlations(values, short), *rank_correlations(values, long)]
        lines.append((found, [name, str(len(values)), *(_signed(v) for v in found)]))
    lines.sort(key=lambda line: -line[0][0] if math.isfinite(line[0][0]) else math.inf)
    head = ["score of the keep-set", "n", "Spearman, short", "Kendall, short", "Spearman, long", "Kendall, long"]
    return markdown_table(head, [cells for _, cells in lines])


def sampling_table(rows: Sequence[PlainRow], base: PlainRow | None, steps_of_rows: int) -> str:
    """FID by sampler steps (first seed), and the rank correlation of each column with the one of all other tables."""
    sampled = [r for r in rows if r.get("samplings")]
    steps = sorted({int(s) for r in sampled for s in r["samplings"]})
    ordered = sorted(sampled, key=lambda r: r["fid"])
    lines = [[r["criterion"], *(sensible(r["samplings"].get(str(s), math.nan)) for s in steps)] for r in ordered]
    if base is not None:
        known = [base["samplings"].get(str(s), {}).get("fid", math.nan) for s in steps]
        lines.append(["(base)", *map(sensible, known)])
    agreement = []
    for s in steps:
        pairs = [(r["fid"], r["samplings"][str(s)]) for r in sampled if str(s) in r["samplings"]]
        agreement.append(_signed(rank_correlations([a for a, _ in pairs], [b for _, b in pairs])[0]))
    lines.append([f"Spearman with {steps_of_rows} steps", *agreement])
    return markdown_table(["FID", *(f"{s} steps" for s in steps)], lines)


def memorisation_table(rows: Sequence[PlainRow], base: PlainRow | None) -> str:
    """Distance of samples to the nearest training image beside that of the validation split."""
    groups = {name: [r["memorisation"] for r in group] for name, group in by_contestant(rows).items()}
    groups |= {"(base)": [base["memorisation"]]} if base is not None else {}
    lines = []
    for name, found in groups.items():
        means = [mean_of([m[key] for m in found]) for key in ("samples", "validation", "ratio", "copies")]
        lines.append([name, *(with_error(m.value, m.standard_error) for m in means)])
    head = ["", "samples to training", "validation to training", "ratio", "share nearer than 99 % of validation"]
    return markdown_table(head, lines)


def speedup_table(rows: Sequence[PlainRow], base: dict[str, Any] | None) -> str:
    """Depth, its share of the base, measured speed-up and FID of every contestant."""
    lines = []
    for name, group in by_contestant(rows).items():
        depth, fid = len(group[0]["kept_blocks"]), mean_of([r["fid"] for r in group])
        share = depth / base["depth"] if base else math.nan
        ratios = "; ".join(
            f"{sensible(mean_of([r['speedup_by_batch'][b] for r in group]).value)} at batch {b}"
            for b in group[0]["speedup_by_batch"]
        )
        lines.append([name, str(depth), sensible(share), ratios, with_error(fid.value, fid.standard_error)])
    return markdown_table(["", "depth", "share of the base", "measured speed-up", "FID"], lines)


def _signed(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else MISSING
