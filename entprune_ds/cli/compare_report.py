"""The outcome of a comparison, written from the finished rows: JSON, Markdown, LaTeX and figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from entprune_ds.atomic import write_bytes, write_text
from entprune_ds.cli import compare_text as text
from entprune_ds.cli.compare_base import base_path
from entprune_ds.cli.compare_plan import Study
from entprune_ds.cli.compare_row import open_bench, read_result, subset_scores
from entprune_ds.cli.compare_rows import PlainRow, at_equal_steps, by_contestant, out_files, plain_rows
from entprune_ds.config import Config, ModelConfig, digest
from entprune_ds.evaluation.compare import mean_of
from entprune_ds.monitor import compare_plots
from entprune_ds.monitor.numbers import percent, sensible

TITLES = {
    "schedule": "One-shot, fixed schedule, vote",
    "estimators": "Entropy estimators",
    "distill": "With and without a teacher",
    "depth": "Other depths",
    "bases": "Other bases, one row on each",
}


def write_report(config: Config, model: ModelConfig, studies: list[Study]) -> list[Path]:
    """Write everything that the finished rows allow; returns the paths."""
    out = Path(config.compare.out)
    rows = {s.name: plain_rows(s, config.compare, lambda name: read_result(out, name)) for s in studies}
    base = read_result(out, "base") or None
    files, written = out_files(out), []
    main = rows.get("criteria", [])
    scores = keep_set_scores(config, model, [*main, *rows["subsets"]]) if rows.get("subsets") else {}
    write_text(files["json"], json.dumps(main, indent=1, allow_nan=False))
    others = {name: r for name, r in rows.items() if name != "criteria"}
    write_text(files["studies"], json.dumps({"base": base, "studies": others, "keep_sets": scores}, indent=1))
    write_text(files["text"], document(config, model, rows, scores, base))
    written += [files["json"], files["studies"], files["text"]]
    if main:
        write_text(files["latex"], text.latex_table(main))
        written.append(files["latex"])
    for name, png in figures(rows, scores).items():
        if png is not None:
            write_bytes(out / name, png)
            written.append(out / name)
    return written


def keep_set_scores(config: Config, model: ModelConfig, rows: list[PlainRow]) -> dict[str, dict[str, float]]:
    """Every score of every keep-set that was trained to the long stop: before training, and after the probes."""
    taken = {row["criterion"]: row for row in rows if "long" in row}
    keep_sets = {name: row["kept_blocks"] for name, row in taken.items()}
    cache = Path(config.compare.out) / "keep_set_scores.json"
    key = digest([keep_sets, vars(config.score), config.compare.seeds[0]])
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    if known.get("key") != key:
        first = replace(config, run=replace(config.run, seed=config.compare.seeds[0]))
        bench = open_bench(first, Path(config.compare.out), base_path(config))
        known = {"key": key, "scores": subset_scores(bench, keep_sets)}
        write_text(cache, json.dumps(known))
    return {
        name: known["scores"][name]
        | {"damage (rise of the validation loss)": row["damage"]}
        | {f"validation loss after {steps} steps": value for steps, value in row["probes"].items()}
        for name, row in taken.items()
    }


def document(
    config: Config, model: ModelConfig, rows: dict[str, list[PlainRow]], scores: dict[str, dict[str, float]],
    base: dict[str, Any] | None,
) -> str:  # fmt: skip
    """compare.md."""
    compare, main = config.compare, rows.get("criteria", [])
    depth, target = len(model.blocks), config.prune.target_depth
    parts = [f"# Comparison: depth {depth} to {target}", protocol(config, main)]
    if main:
        what = "equal total compute" if compare.equal_compute else f"{compare.recovery_steps} optimizer steps"
        parts += [f"## Criteria at {what}", text.markdown_table(*text.figure_cells(main, base)), text.standing(main)]
        parts += [text.margins(main, config.prune.criterion)]
        if compare.equal_compute:
            parts += [text.over_budget(main)]
            equal = at_equal_steps(main)
            parts += [f"## Criteria at {compare.recovery_steps} optimizer steps, whatever the checks cost"]
            parts += [text.markdown_table(*text.figure_cells(equal, base)), text.standing(equal)]
            parts += [text.margins(equal, config.prune.criterion)]
        parts += ["## Memorisation", "Mean distance to the nearest training image (root mean square over pixels)."]
        parts += [text.memorisation_table(main, base)]
    if any(row.get("samplings") for row in main):
        parts += ["## Sampler steps", f"FID, seed {compare.seeds[0]}, at the stop of the first table."]
        parts += [text.sampling_table(main, base, config.sample.num_steps)]
    if scores:
        short, long = compare.recovery_steps, compare.long_steps
        parts += ["## Which score of a keep-set predicts the FID after recovery", f"Seed {compare.seeds[0]}; "
                  f"short: {short} steps, long: {long} steps; higher is better."]  # fmt: skip
        parts += [text.correlation_table([*main, *rows["subsets"]], scores)]
    for name, title in TITLES.items():
        if rows.get(name):
            table = text.markdown_table(*text.figure_cells(rows[name], base))
            parts += [f"## {title}", table, text.standing(rows[name])]
            parts += [text.margins(rows[name], config.prune.criterion)] if name == "bases" else []
            if compare.equal_compute and name != "depth":
                parts += [text.over_budget(rows[name])]
                equal = at_equal_steps(rows[name])
                parts += [f"### At {compare.recovery_steps} optimizer steps"]
                parts += [text.markdown_table(*text.figure_cells(equal, base)), text.standing(equal)]
            parts += [text.speedup_table(rows[name], base)] if name == "depth" else []
    return "\n\n".join(part for part in parts if part) + "\n"


def protocol(config: Config, rows: list[PlainRow]) -> str:
    """What all figures depend on."""
    compare, sample, train = config.compare, config.sample, config.train
    lines = [
        "Made by `entprune-ds compare`; all numbers and sentences come from the rows (compare.json). Mean ± standard "
        "error over n seeds; lowest FID first. Damage: rise of the validation loss at the removal. TMACs: all "
        "multiply-accumulates of checks and training, counted.",
        f"- seeds {list(compare.seeds)}; {compare.recovery_steps} plain steps at the target depth are the compute of "
        f"all, batch {train.global_batch_size}, learning rate {train.learning_rate:g}, EMA decay {train.ema_decay:g}",
        f"- {sample.num_samples} samples, {sample.sampler}, {sample.num_steps} steps, cfg {sample.cfg_scale:g}, "
        f"labels {sample.labels}, EMA weights; latency at batch {config.evaluate.latency_batches[0]}, one CPU thread",
        f"- {config.score.draws} draws a score; validation loss of the EMA weights on {train.validation_draws} draws",
    ]
    if rows:
        most = max(rows, key=lambda r: r["macs_scoring"] / r["macs"])
        share = percent(most["macs_scoring"] / most["macs"])
        lines.append(f"- dearest checks: {most['criterion']}, {share} of its {sensible(most['macs'] / 1e12)} TMACs")
    return "\n".join(lines)


def figures(rows: dict[str, list[PlainRow]], scores: dict[str, dict[str, float]]) -> dict[str, bytes | None]:
    """{file name: PNG}."""
    found: dict[str, bytes | None] = {}
    for name, group in rows.items():
        if group and name != "subsets":
            groups = by_contestant(group)
            values = {n: [r["fid"] for r in g] for n, g in groups.items()}
            errors = {n: mean_of(v).standard_error for n, v in values.items()}
            found[f"{name}_fid.png"] = compare_plots.bars(values, errors, "FID, lower is better; dots: seeds")
    if main := rows.get("criteria"):
        points = {
            n: (mean_of([r["damage"] for r in g]).value, mean_of([r["fid"] for r in g]).value)
            for n, g in by_contestant(main).items()
        }
        found["damage_fid.png"] = compare_plots.scatter(points, "damage right after the removal", "FID after recovery")
    if scores:
        sets = [r for r in [*rows["criteria"], *rows["subsets"]] if "long" in r]
        names = list(next(iter(scores.values())))
        panels = {n: [scores[r["criterion"]].get(n, float("nan")) for r in sets] for n in names}
        short, long = ([r[which]["fid"] for r in sets] for which in ("equal_steps", "long"))
        chosen = [not r["criterion"].startswith("set_") for r in sets]
        found["subsets.png"] = compare_plots.score_panels(panels, short, long, chosen)
    return found
