"""`entprune-ds compare`: criteria side by side, from one base, at equal compute, with error bars."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprune_ds.cli.common import help_text, leave, refuse, split_shortcuts, wants_help
from entprune_ds.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from entprune_ds.config import ModelConfig

HELP = """\
Compare criteria: one training per criterion and seed, over the ordinary trainer, all from the same base, on the same
draws, with the same recovery. Each row is then sampled and measured: FID, KID, class accuracy, validation loss, damage
(rise of the validation loss at the removal), latency, and what its checks cost. FID and accuracy are those of the
built-in extractor, which knows digits only (1x8x8, 10 classes); the workers are meant for CPUs, a thread each.

  entprune-ds compare preset=digits data.shards=data_digits/train target_depth=4 --dry-run     the plan, and its time
  entprune-ds compare preset=digits data.shards=data_digits/train target_depth=4 criteria=[ced,loss,random] seeds=[0,1]
  entprune-ds compare preset=digits ... base=runs/base/model out=runs/compare study=[criteria,subsets,sampling]

Equal compute: every multiply-accumulate of checks (scoring, races, learned gates) and training is counted. A row is
measured at the step where its total is that of compare.recovery_steps plain steps at the target depth, so that a costly
criterion recovers for fewer steps, and once more at compare.recovery_steps. Both are reported.

The same command again goes on: finished rows are kept, an interrupted row resumes from its checkpoint, a failed one is
tried again. Several commands may share the folder; each row is locked by the process that trains it.

OUT/compare.json holds the rows, compare.md tables and text, compare.tex the table for LaTeX, *.png the figures,
compare_studies.json the rows and scores of the other studies; logs/ROW.txt holds what a row printed.

Studies (study=[...]): criteria; subsets (random keep-sets: which score predicts the FID after recovery); schedule
(one-shot, fixed and voted removals); estimators (of the entropy); distill (kinds of recovery); sampling (sampler
steps); depth (further target depths); bases (further bases, compare.bases=[3,4], each pruned once by every criterion).
Distances of samples to the training images are measured always.
"""
SECTIONS = ["compare", "prune", "score", "race", "learned", "distill", "train", "sample", "evaluate"]
SHORTCUTS = {
    "criteria": "compare.criteria", "seeds": "compare.seeds", "base": "compare.base", "study": "compare.study",
    "out": "compare.out", "workers": "compare.workers", "target_depth": "prune.target_depth",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 some rows failed, 2 refused, 128 + signal when stopped."""
    given = list(sys.argv[1:] if argv is None else argv)
    if wants_help(given):
        print(help_text(HELP, SECTIONS))
        return 0
    dry_run, part = "--dry-run" in given, next((w.partition("=")[2] for w in given if w.startswith("--worker=")), "")
    words = split_shortcuts([w for w in given if not w.startswith("--")], SHORTCUTS)
    unknown = [w for w in given if w.startswith("--") and w != "--dry-run" and not w.startswith("--worker=")]
    if unknown:
        return refuse([f"`{unknown[0]}` is not known. See --help."])
    try:
        if part:
            return _worker(load_config(words, check=lambda config: []), part)
        config = load_config(words, check=lambda config: _code_problems(config, words) or _problems(config))
        return _run(config, words, dry_run)
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])


def _worker(config: Config, part: str) -> int:
    """One worker process."""
    from entprune_ds.cli.compare_worker import work
    from entprune_ds.faults import Interrupted

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(config, part)
    except (Interrupted, BrokenPipeError) as error:  # the parent is gone, or has had enough
        return 128 + (error.number if isinstance(error, Interrupted) else 13)
    return 0


def _end_with_parent() -> None:
    """Stop when the other end of the standard input is gone: however the parent ends, its end goes with it."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _code_problems(config: Config, words: list[str]) -> list[str]:
    """Criteria that are files, whose code would run, and that nobody has written on the command line."""
    files = [c for c in config.compare.criteria if c.endswith(".py")]
    if not files or any(w.startswith("compare.criteria=") for w in words):
        return []
    message = (
        f"the preset sets `compare.criteria` to a file ({files[0]}), whose code would run. Take it out; who wants "
    )
    return [message + "it writes criteria=[...] on the command line."]


def _problems(config: Config) -> list[str]:
    """What can be known to be wrong before the first row: of the command, of the base, and of every kind of row."""
    from entprune_ds.config import problems_of
    from entprune_ds.config_checks_compare import compare_problems

    found = problems_of(config) if not config.compare.base else []  # the base's architecture counts, not the settings'
    found += compare_problems(config)
    if found:
        return found
    from entprune_ds.cli.compare_base import base_config, base_path
    from entprune_ds.cli.compare_plan import row_config, rows_of, studies
    from entprune_ds.cli.compare_sources import other_settings
    from entprune_ds.cli.evaluate import extractor_problem
    from entprune_ds.cli.sample import sampling_problems
    from entprune_ds.data.index import load_index
    from entprune_ds.evaluation.features import FEATURES
    from entprune_ds.preflight import data_problems, training_problems

    found = data_problems(config)
    if not found and (problem := extractor_problem(load_index(config.data.shards, config.data.allow_pipe))):
        found = [f"`data.shards`: {problem} Compare there by the validation losses of single runs."]
    if config.sample.num_samples <= FEATURES:
        message = f"`sample.num_samples` must be above {FEATURES}, the features that FID is made of, got "
        found.append(f"{message}{config.sample.num_samples}. Raise it.")
    if found:
        return found
    model, here = base_model(config), base_path(config).is_dir()
    if not here:
        found += training_problems(base_config(config))
    else:
        found += sampling_problems(config, base_path(config), "compare.base")
    checked: set[str] = set()
    for row in rows_of(studies(config, model)):
        if row.criterion not in checked:
            checked.add(row.criterion)
            settings = row_config(config, row, model, Path(config.compare.out))
            problems = training_problems(settings) if here and len(checked) == 1 else problems_of(settings)
            found += [p for p in problems if p not in found]
    return found or other_settings(config, model)


def base_model(config: Config) -> ModelConfig:
    """Architecture of the base, with its path as the weights.

    Raises:
        ValueError: when it cannot be read.
    """
    from dataclasses import replace

    from entprune_ds.cli.compare_base import base_config, base_path
    from entprune_ds.interop.weights import open_weights

    path = base_path(config)
    known = bool(config.compare.base) or path.is_dir()
    model = open_weights(path, assumed=config.model).model if known else base_config(config).model
    return replace(model, weights=str(path))


def _run(config: Config, words: list[str], dry_run: bool) -> int:
    from entprune_ds.cli.compare_base import base_path
    from entprune_ds.cli.compare_plan import rows_of, studies
    from entprune_ds.cli.compare_show import Progress, show_plan
    from entprune_ds.faults import Interrupted, raise_on_signals

    model, out = base_model(config), Path(config.compare.out)
    found = studies(config, model)
    rows = rows_of(found)
    estimates = show_plan(config, model, rows)
    if dry_run:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "failures").glob("*.json"):
        old.unlink()  # tried again
    raise_on_signals()
    watch = Progress(config, rows, estimates)
    from entprune_ds.cli.compare_pool import Pool

    try:
        if not base_path(config).is_dir():
            Pool(words, "base", out, 1, os.cpu_count() or 1, watch).run()
            if watch.failed:
                return _ended(watch)
        Pool(words, "rows", out, config.compare.workers, 1, watch).run()
    except Interrupted as error:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        return 128 + error.number
    except RuntimeError as error:
        return refuse([str(error)])
    from entprune_ds.cli.compare_report import write_report

    begin = time.monotonic()
    for path in write_report(config, model, found):
        print(path)
    print(f"tables and figures: {time.monotonic() - begin:.0f} s")
    return _ended(watch)


def _ended(watch: Any) -> int:
    """Say which rows failed, and where their logs are."""
    for path in sorted((watch.out / "failures").glob("*.json")):
        failure = json.loads(path.read_text())
        print(f"error: row {failure['row']} failed: {failure['why']} Log: {failure['log']}", file=sys.stderr)
    return int(bool(watch.failed))


if __name__ == "__main__":
    leave(main())
