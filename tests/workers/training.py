"""Worker functions of test_training.py: whole trainings through the command's own entry point."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from entprune_ds import comm


def train(runs: list[list[str]]) -> list[int]:
    """Run several trainings one after the other in these processes; returns their exit statuses."""
    from entprune_ds.cli.train import main

    return [main(words) for words in runs]


def scores(export: str, shards: str, zero_stage: int, out: str, stages: int = 1) -> dict:
    """Block scores of an exported model under ZeRO or on a pipeline, in float64; also the number of gathers.

    At the end what a check says when every rank wants another cut, and when a user's criterion orders by the rank.
    """
    from dataclasses import replace

    import torch

    from entprune_ds.calibration import examples_of
    from entprune_ds.config import LearnedConfig, PruneConfig, ScoreConfig
    from entprune_ds.coordinator import measure_candidate, measuring, proxy_draws, run_check
    from entprune_ds.diffusion.objective import build_objective
    from entprune_ds.engine.build import build_engine
    from entprune_ds.engine.view import ShardedView
    from entprune_ds.importance.learned import measure_learned
    from entprune_ds.importance.leave_one_out import measure_sweep
    from entprune_ds.importance.magnitude import measure_magnitude
    from entprune_ds.importance.scores import scores_as_json
    from entprune_ds.importance.taylor import measure_diff_pruning, measure_taylor
    from entprune_ds.interop.safetensors import read_export
    from entprune_ds.run_state import load_weights
    from tests.tiny import tiny_config

    model, _ = read_export(Path(export))
    config = tiny_config(zero_stage)
    config = replace(config, model=model, data=replace(config.data, shards=shards))
    config = replace(config, parallel=replace(config.parallel, pipe_stages=stages))
    engine = build_engine(config, model)
    load_weights(engine, Path(export), model)
    view = ShardedView(engine, "weight", torch.float64)
    prune, score = (
        PruneConfig(ntk_samples=4, zico_batches=4, zico_batch_size=4),
        ScoreConfig(draws=96, batch_size=32, gradient_batches=3, gradient_batch_size=8),
    )
    config = replace(config, prune=prune, score=score, run=replace(config.run, seed=3))
    found = scores_as_json(measure_sweep(measuring(view, model.blocks, config, 0, examples_of(config, 0))))
    gathers = view.gathers
    objective = build_objective(model, config.diffusion)
    draws = proxy_draws(objective, prune, 3, 0, examples_of(config, 0))
    candidate = measure_candidate(view, model.blocks[1:], draws, objective, prune, 3, 0)
    result = {"scores": found, "gathers": gathers, "ntk": candidate.ntk, "zico": candidate.zico_mean}
    few = replace(config, prune=replace(prune, target_depth=2), learned=LearnedConfig(steps=5, batch_size=10))
    m = measuring(view, model.blocks, few, 0, examples_of(config, 0))
    measures = (measure_magnitude, measure_taylor, measure_diff_pruning, measure_learned)
    result["others"] = scores_as_json({name: by_block for f in measures for name, by_block in f(m).items()})
    examples, rank = examples_of(config, 0), comm.rank()
    try:
        run_check(view, model.blocks, config, 0, 0, 4, examples, lambda d: (rank, len(d.kept_blocks) - rank))
        result["disagreement"] = ""
    except comm.DistributedError as error:
        result["disagreement"] = str(error)
    unsteady = Path(f"{out}/unsteady_{comm.rank()}.py")
    unsteady.write_text(
        "import os\nfrom entprune_ds.importance.criteria import Criterion\n"
        "CRITERION = Criterion(lambda r: sorted(r.kept_blocks, reverse=os.environ['RANK'] == '1'))\n"
    )
    mine = replace(prune, criterion=str(unsteady), target_depth=2)
    try:
        run_check(view, model.blocks, replace(few, prune=mine, score=replace(score, sweep="needed")), 0, 0, 4, examples)
        result["unsteady"] = ""
    except comm.DistributedError as error:
        result["unsteady"] = str(error)
    Path(f"{out}/scores_{comm.rank()}.json").write_text(json.dumps(result))
    return result


def starts(cases: list[tuple[int, list[str]]]) -> list[str]:
    """What each start from weights says: "" or the error of this rank; a case is (ZeRO stage, path of each rank)."""
    from entprune_ds.engine.build import build_engine, destroy_engine
    from entprune_ds.run_state import load_weights
    from tests.tiny import tiny_config

    said = []
    for zero_stage, paths in cases:
        config = tiny_config(zero_stage)
        engine = build_engine(config, config.model)
        try:
            load_weights(engine, Path(paths[comm.rank()]), config.model)
            said.append("")
        except comm.DistributedError as error:
            said.append(str(error))
        destroy_engine(engine)
    return said


def train_and_hear(runs: list[list[str]]) -> list[list]:
    """Exit status of every training, and what this rank said on the way."""
    from entprune_ds.cli.train import main

    found = []
    for words in runs:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = main(words)
        found.append([status, said.getvalue()])
    return found
