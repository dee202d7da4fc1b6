"""`entprune-ds score`: every criterion on any model without training, and recorded decisions made once more."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprune_ds.cli.common import (
    help_text,
    launched_words,
    leave,
    one_line,
    refuse,
    split_shortcuts,
    wants_help,
    with_run,
)
from entprune_ds.config import (
    Config,
    ConfigError,
    PruneConfig,
    RunConfig,
    SampleConfig,
    SoftConfig,
    load_config,
    problems_of,
)
from entprune_ds.config_checks import SAMPLERS
from entprune_ds.config_methods import SWEEP_CRITERIA

if TYPE_CHECKING:
    from entprune_ds.interop.source import Source
    from entprune_ds.scoring import Scored

HELP = """\
Score the blocks of a model by every criterion, without training: prints and plots the scores with their standard
errors, the orders of removal, what each criterion costs, and the rank correlations between all of them.

  entprune-ds score run=runs/demo                                      newest checkpoint of a run, or its model
  entprune-ds score weights=demo_model data.shards=data_digits/train out=scores
  entprune-ds score weights=runs/demo/checkpoints/step_00000400 data.shards=... score.criteria=[ced,loss]
  deepspeed --num_gpus 8 --module entprune_ds.cli.score weights=...    ranks split the draws; each holds the model
  entprune-ds score --replay runs/demo                                 makes every recorded decision again

Writes scores.json, scores.html and three PNG files. The draws are those of a run's first check with the same
run.seed. Criteria that need a training run are named as such. --replay takes the scores, proxies and the state that
decisions.jsonl holds, decides again and compares; it returns 1 where anything differs.
"""
SECTIONS = ["score", "prune", "data"]
SHORTCUTS = {"weights": "model.weights", "out": "score.out"}
WHERE = "Give a model, weights=DIR (an export, a checkpoint, official weights), or run=RUNS/NAME."


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 a decision differs or no criterion says anything, 2 refused."""
    words, _ = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        if "--replay" in words:
            return _replay([word for word in words if word != "--replay"])
        words, folder = with_run(split_shortcuts(words, SHORTCUTS), "score")
        leave_group = _join()  # first: all ranks look for the newest checkpoint together
        config, source = _load(words, folder)
        status = _score(config, source, Path(config.score.out or (folder or Path()) / "scores"))
        leave_group()
        return status
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])


def _join() -> Callable[[], None]:
    """Join the ranks of a launcher, where there is one; returns what leaves them again."""
    if "RANK" not in os.environ:
        return lambda: None
    from entprune_ds import comm
    from entprune_ds.cli.train import limit_threads

    limit_threads()
    return comm.shutdown if comm.init(RunConfig().timeout_seconds) else lambda: None


def _load(words: list[str], folder: Path | None) -> tuple[Config, Source]:
    """Settings that fit the model, and the model.

    Raises:
        ConfigError: listing every problem.
    """
    from entprune_ds.launcher import launch_problems
    from entprune_ds.preflight import data_problems

    config = load_config(words, check=lambda config: launch_problems())
    if not config.model.weights:
        raise ConfigError([*problems_of(config), f"`model.weights` is missing. {WHERE}"])
    try:
        source = _source(config, folder)
    except ValueError as error:
        raise ConfigError([f"`model.weights`: {error}"]) from error
    depth, ranks = len(source.model.blocks), int(os.environ.get("WORLD_SIZE", "1"))
    target = config.prune.target_depth
    target = target if target is not None and 1 <= target < depth else depth // 2
    data = replace(config.data, num_readers=1)  # calibration reads one shard after another
    config = replace(config, model=replace(source.model, weights=config.model.weights), data=data)
    found = [f"`model.weights`: the model has {depth} block, there is nothing to compare."] if depth < 2 else []
    asked, score = config.prune, config.score
    once = replace(score, mode="once")  # one scoring for all criteria, whatever the run does
    prune = PruneConfig(target_depth=target, num_checks=1, combined=asked.combined)
    sample = SampleConfig(sampler=SAMPLERS[source.model.process][0])  # nothing is sampled
    checked = replace(config, prune=prune, score=once, soft=SoftConfig(), sample=sample)
    found = found or problems_of(checked) or data_problems(config)
    if score.until == "resolved" and asked.criterion not in SWEEP_CRITERIA:
        message = f"`score.until` resolved needs `prune.criterion` to be one of {', '.join(SWEEP_CRITERIA)}, whose "
        found.append(f"{message}blocks are told apart, got {asked.criterion}. Set it, or score.until=draws.")
    if config.score.batch_size < ranks:
        found.append(f"`score.batch_size` must be at least the number of ranks ({ranks}).")
    if found:
        raise ConfigError(found)
    return replace(config, prune=replace(asked, target_depth=target), score=once), source


def _source(config: Config, run: Path | None) -> Source:
    """Weights of a run's newest checkpoint, of a checkpoint, or of a model of any known format."""
    from entprune_ds.comm import DistributedError
    from entprune_ds.engine.checkpoint import file_problems, find_checkpoint, read_checkpoint
    from entprune_ds.export import checkpoint_source
    from entprune_ds.interop.weights import opened

    path = Path(config.model.weights)
    named = [path] if run is None or path != run / "model" else []
    if not named and run is not None:
        try:
            checkpoint = find_checkpoint(run / "checkpoints", lambda text: print(f"warning: {text}", file=sys.stderr))
        except DistributedError as error:  # none is intact
            raise ValueError(str(error)) from error
        if checkpoint is not None:
            return checkpoint_source(checkpoint, config.score.weights)
    if (path / "manifest.json").is_file():
        if damage := file_problems(path):
            raise ValueError(f"checkpoint {path} is damaged: {damage[0]}. Restore it, or choose another one.")
        return checkpoint_source(read_checkpoint(path), config.score.weights)
    return opened(path, config.model)


def _score(config: Config, source: Source, out: Path) -> int:
    """Measure on all ranks; rank 0 prints and writes."""
    import torch

    from entprune_ds import comm
    from entprune_ds.calibration import examples_of
    from entprune_ds.importance.criteria import CRITERIA
    from entprune_ds.importance.parts import ModuleParts
    from entprune_ds.interop.finite import check_finite
    from entprune_ds.interop.source import loaded_model
    from entprune_ds.ranking import measuring
    from entprune_ds.scoring import score_model

    check_finite(source, f"`model.weights` ({config.model.weights})")
    model = loaded_model(source).to(comm.device())
    parts = ModuleParts(model, getattr(torch, config.score.dtype))
    leaving = len(source.model.blocks) - (config.prune.target_depth or 0)
    m = measuring(parts, source.model.blocks, config, 0, examples_of(config, 0), leaving)
    own = config.prune.criterion
    scored = score_model(m, config.score.criteria or (*CRITERIA, *([own] if own not in CRITERIA else [])))
    if comm.is_main():
        result = _as_json(scored, config, source, comm.world_size())
        _show(result)
        _write(result, out)
        print(f"scores: {out / 'scores.json'}, {out / 'scores.html'}")
    return int(all(measured.order is None for measured in scored.criteria.values()))


def _as_json(scored: Scored, config: Config, source: Source, ranks: int) -> dict[str, Any]:
    """scores.json."""
    from entprune_ds.importance.scores import scores_as_json
    from entprune_ds.monitor.score_page import correlations_of
    from entprune_ds.pruning.decision import plain

    scores = plain(scores_as_json(scored.scores))
    model = {"path": config.model.weights, "weights": source.facts.get("weights"), "step": source.facts.get("step")}
    model |= {"depth": len(source.model.blocks), "kept_blocks": list(source.model.blocks)}
    score = config.score
    draws = {"draws": score.draws, "batch_size": score.batch_size, "dtype": score.dtype, "seed": config.run.seed}
    draws |= {"data": config.data.shards, "ranks": ranks, "target_depth": config.prune.target_depth}
    return {
        "model": model,
        "draws": draws,
        "criteria": {name: vars(found) for name, found in scored.criteria.items()},
        "scores": scores,
        "correlations": plain(vars(correlations_of(scores))),
    }


def _show(result: dict[str, Any]) -> None:
    """The tables, as wide as the terminal allows."""
    from rich.console import Console
    from rich.table import Table

    from entprune_ds.monitor.score_page import block_rows, correlations_of, criteria_rows

    console = Console()

    def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
        """A table, in parts of so many columns as fit at `width` characters each, the first repeated."""
        count = max(1, (console.width - width) // (width + 3))
        for start in range(1, len(head), count):
            shown = Table(head[0], *head[start : start + count], title=title, title_justify="left")
            for row in rows:
                shown.add_row(row[0], *row[start : start + count])
            console.print(shown)

    show("Scores, ± standard error", *block_rows(result["scores"]), width=18)
    rows = criteria_rows(result["criteria"])
    show("Criteria", ("criterion", "seconds", "order of removal, first to go first"), rows, width=1)
    found = correlations_of(result["scores"])
    for name, matrix in (("Spearman ρ", found.spearman), ("Kendall τ", found.kendall)):
        rank_rows = [(a, *(f"{v:.2f}" for v in row)) for a, row in zip(found.names, matrix, strict=True)]
        show(f"Rank correlation, {name}", ("", *found.names), rank_rows, width=12)


def _write(result: dict[str, Any], out: Path) -> None:
    """scores.json, the figures and the page."""
    from entprune_ds.atomic import write_bytes, write_text
    from entprune_ds.monitor.score_page import figures, render

    out.mkdir(parents=True, exist_ok=True)
    pictures = figures(result)
    write_text(out / "scores.json", json.dumps(result, indent=2, allow_nan=False))
    for name, png in pictures.items():
        write_bytes(out / f"{name}.png", png)
    write_bytes(out / "scores.html", render(result, pictures))


def _replay(words: list[str]) -> int:
    """Every recorded decision made again; prints one line for each."""
    from entprune_ds.replay import read_decisions, replay

    if len(words) != 1:
        return refuse([f"--replay takes one run folder, such as runs/demo, got {' '.join(words) or 'nothing'}."])
    replayed = replay(read_decisions(Path(words[0].removeprefix("run="))))
    for found in replayed:
        decision = found.decision
        said = "; ".join(found.differences) or ("the same again" if found.known else "recorded without its state")
        print(one_line(f"check {decision.check}, step {decision.step}, depth {decision.chosen_depth}: {said}"))
    return 1 if any(found.differences for found in replayed) else 0


if __name__ == "__main__":
    leave(main())
