"""The training loop. `train` is the table of contents: one batch, or one pruning decision, from top to bottom."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.bad_steps import go_back, left_out
from entprune_ds.calibration import examples_of
from entprune_ds.config import Config
from entprune_ds.coordinator import History, run_check
from entprune_ds.data.latents import Batch
from entprune_ds.diffusion.objective import Draws
from entprune_ds.engine.build import destroy_engine
from entprune_ds.engine.checkpoint import read_checkpoint
from entprune_ds.engine.resize import next_cut, resize
from entprune_ds.engine.step_figures import step_figures
from entprune_ds.engine.step_time import step_timer
from entprune_ds.engine.view import ShardedView
from entprune_ds.export import export_checkpoint
from entprune_ds.faults import explained, locked_by_job, raise_on_signals, tell, watched
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.scores import Scores
from entprune_ds.learning_rate import learning_rate
from entprune_ds.logs import get_logger, progress
from entprune_ds.mac_counter import counted
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.surgery import narrowed
from entprune_ds.race import hold_race
from entprune_ds.run_state import Run, checkpoint, open_run, record_decision, reopen_stream, stream_state
from entprune_ds.run_view import lineage, log_macs, log_step, sample_grid, validate
from entprune_ds.soft_budget import removal_steps
from entprune_ds.soft_pruning import soft_due, soft_update
from entprune_ds.step_metrics import log_blocks
from entprune_ds.stop_request import Stopped, StopWatch, listen

log = get_logger()


def train(config: Config, arguments: list[str]) -> None:
    """Train, prune and hand over: the whole run of one rank. Collective over the job.

    Args:
        config: resolved and checked.
        arguments: the words of the command line, kept for "how to reproduce".
    """
    raise_on_signals()
    listen()
    with explained(config.run_dir):
        joined = comm.init(config.run.timeout_seconds)
        with locked_by_job([config.run_dir], "`run.name` or `run.root`"):
            with watched(config.run.timeout_seconds, config.run_dir):
                run = open_run(config, arguments)
                try:
                    loop(run)
                    conclude(run)
                except BaseException as error:
                    tell(error, config.run_dir)  # before anything that may block or be interrupted
                    with contextlib.suppress(Exception):
                        run.monitor.finish(exit_code=0 if isinstance(error, Stopped) else 1, hurry=True)
                    raise
            hand_over(run)
            destroy_engine(run.engine)  # the process may go on with another run
        if joined:
            comm.shutdown()


def loop(run: Run) -> None:
    """Optimizer steps, with a pruning check before each step of `run.checks`."""
    config = run.config
    last = min(config.train.num_steps, config.train.stop_step or config.train.num_steps)
    if run.step >= last:
        log.info("all %d steps are done already; only the closing figures are made again", run.step)
    with progress("train", total=config.train.num_steps, done=run.step) as line:
        stop = StopWatch(run.step)
        run.engine.parts.restart()
        while run.step < last:
            if stop.asked(run.step):
                checkpoint(run)
                raise Stopped(f"stopped before step {run.step}, as asked by a signal.")
            if run.step in run.checks and all(d.step != run.step for d in run.decisions):
                prune_check(run)
                stop = StopWatch(run.step)  # it may have taken minutes, here as below: the next step is looked at
            if soft_due(config, run.soft, run.step):
                soft_prune(run)
            loss = one_step(run)
            if config.train.bad_steps and run.guard.in_a_row >= config.train.bad_steps:
                go_back(run)
                stop = StopWatch(run.step)
                continue
            if run.step % config.monitor.log_every == 0:
                log_step(run, loss, line)
            log_blocks(run)
            if config.train.validate_every and run.step % config.train.validate_every == 0:
                validate(run)
                stop = StopWatch(run.step)
            if config.monitor.sample_every and run.step % config.monitor.sample_every == 0:
                sample_grid(run, "training")
                stop = StopWatch(run.step)
            if run.step % config.train.checkpoint_every == 0:
                checkpoint(run)
                stop = StopWatch(run.step)


def one_step(run: Run) -> Tensor:
    """One optimizer step; returns the mean loss of this data-parallel rank, not yet synchronised."""
    config, engine = run.config, run.engine
    engine.set_learning_rate(learning_rate(config.train, run.step))
    if config.distill.start == run.step:
        run.guard.settle_again()  # it begins to minimise something else
    with counted(config.monitor.count_macs and run.counted != engine.model_config) as macs, guarded(run):
        with engine.parts.part("data"):
            draws = next_draws(run)
        loss = run.recovery.train_step(engine, draws, run.objective, run.step, run.decisions)
    run.step, run.counted = run.step + 1, engine.model_config
    if run.guard.reason:
        left_out(run, loss)
    else:
        engine.update_ema(config.train.ema_decay)
    log_macs(run, "train/step_macs", macs)
    comm.mark_progress()
    return loss


def guarded(run: Run) -> contextlib.AbstractContextManager[None]:
    """Where a bad step is left out; see loss_guard.py."""
    if not run.config.train.bad_steps:
        return contextlib.nullcontext()
    return run.engine.guard.asking(lambda: run.guard.allows(*step_figures(run.engine)))


def next_draws(run: Run) -> list[Draws]:
    """Micro-batches of the next step, none on a stage between the first and the last.

    Noise and t come from rng.py, so that first and last stage draw the same.
    """
    config, batch = run.config, next_batch(run)
    if batch is None:
        return []
    draws = run.objective.make_draws(
        batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose="train", step=run.step,
        label_dropout=config.train.label_dropout, null_label=config.model.num_classes,
    )  # fmt: skip
    return draws.split(run.engine.ds.train_micro_batch_size_per_gpu())


def next_batch(run: Run) -> Batch | None:
    """This data-parallel rank's part of the next global batch, where the stage reads it.

    A damaged shard ends the job, with the shard's name.

    The first batch of a start is waited for together: what is wrong with the data from the beginning ends all ranks
    with the same message. Later each rank is alone, for a meeting at every step would cost time.
    """
    batch, error = None, None
    try:
        batch = run.stream.next_batch() if run.engine.reads_data else None
    except (ValueError, OSError) as problem:
        error = f"step {run.step}: {problem}"
    if not run.reading:
        comm.raise_together(error)
        run.reading = True
    if error is not None:
        raise comm.RankError(error)
    return batch


def prune_check(run: Run) -> None:
    """Score, vote, decide; then resize every rank's shard in place, and go on."""
    config, engine, check = run.config, run.engine, run.checks.index(run.step)
    checkpoint(run)
    log.info(
        "check %d (%d in all, from 0) at step %d: scoring %d blocks", check, len(run.checks), run.step, engine.depth
    )
    if config.prune.recovery_tolerance is not None:
        validate(run)
    parts = ShardedView(engine, "weight", getattr(torch, config.score.dtype))
    with counted(config.monitor.count_macs) as macs:
        decision, times = run_check(
            parts, engine.kept_blocks, config, check, run.step, len(config.model.blocks), examples_of(config, check),
            recut=lambda d: next_cut(run.engine, config, narrowed(run.engine.model_config, d.kept_blocks, d.narrow)),
            hold_race=lambda m, scores: held_race(run, m, scores),
            history=History(run.last_removal, tuple(run.validations)), step_seconds=step_timer(engine, config),
        )  # fmt: skip
    del parts
    record_decision(run, decision)
    run.monitor.log(run.step, {"prune/score_seconds": times.score, "prune/vote_seconds": times.vote})
    if decision.race:
        run.monitor.log(run.step, {"prune/race_seconds": times.race})
    log_macs(run, "prune/score_macs", macs)
    narrower = f"; made narrower: {list(decision.narrow)}" if decision.narrow else ""
    log.info("check %d: %s Blocks removed: %s%s", check, decision.reason, list(decision.dropped) or "none", narrower)
    if decision.removes and not decision.score_only:
        carry_out(run, decision)
    run.engine.parts.restart()


def soft_prune(run: Run) -> None:
    """Move the mask of soft pruning, and at some updates remove what it has closed."""
    config, engine, soft = run.config, run.engine, run.soft
    assert soft is not None  # it is due
    if run.step in removal_steps(config):
        checkpoint(run)
    with counted(config.monitor.count_macs) as macs:
        update = soft_update(engine, config, soft, run.step, examples_of(config, soft.updates))
    log_macs(run, "prune/score_macs", macs)
    run.monitor.log(run.step, update.metrics)
    run.guard.settle_again()
    run.engine.parts.restart()
    run.validated = (-1, -1)  # with other gates it is another model
    if update.decision is None:
        return
    record_decision(run, update.decision)
    log.info("soft pruning at step %d: %s", run.step, update.decision.reason)
    if update.decision.removes:
        carry_out(run, update.decision)


def carry_out(run: Run, decision: PruneDecision) -> None:
    """Resize to what a decision keeps, between a validation before and one after."""
    config, engine, check = run.config, run.engine, decision.check
    validate(run)
    sample_grid(run, f"check_{check}_before")
    cursor, dp_size = stream_state(run), engine.dp_size
    run.engine, report = resize(engine, config, decision.kept_blocks, decision.cut, decision.narrow)
    if run.engine.dp_size != dp_size:  # the pipeline has shrunk
        reopen_stream(run, cursor)
    log.info("resized to depth %d in %.2f s, optimizer state kept", run.engine.depth, report.seconds)
    if config.prune.regrow_micro_batch:
        ds = run.engine.ds
        plan = ds.train_micro_batch_size_per_gpu(), ds.gradient_accumulation_steps()
        log.info("micro-batch %d x accumulation %d", *plan)
    run.monitor.log(run.step, report.metrics())
    run.guard.settle_again()
    run.validated = (-1, -1)  # blocks may be narrower at the same depth
    validate(run)
    sample_grid(run, f"check_{check}_after")
    run.engine.parts.restart()


def held_race(run: Run, m: Measuring, scores: Scores) -> tuple[Scores, dict[str, Any], Parts]:
    """A recovery race from the state of the run, which goes on with the engine that it leaves. Collective."""
    found, run.engine = hold_race(run.engine, m, scores, run.step)
    return found.scores, found.record, ShardedView(run.engine, "weight", m.parts.dtype)


def conclude(run: Run) -> None:
    """Last checkpoint, validation and samples. Collective.

    Raises:
        DistributedError: no step of the whole run counted (loss_guard.py), so that there is nothing to hand over.
    """
    done = run.step >= run.config.train.num_steps  # a stopped one may still meet good batches
    if done and run.guard.skipped and not run.engine.ema_count:
        message = f"none of the {run.step} steps counted: {run.guard.reason}. Nothing is handed over. "
        raise comm.DistributedError(message + "Look at the data and the weights, or lower train.learning_rate.")
    checkpoint(run)  # first: whatever happens to the rest, the training is done
    run.stream.close()
    validate(run)
    with progress("samples", total=run.config.sample.grid) as line:
        sample_grid(run, "final", line.update)


def hand_over(run: Run) -> None:
    """Rank 0 exports the model from the last checkpoint and closes the monitor."""
    if comm.is_main():
        newest = read_checkpoint(run.folder / "checkpoints" / f"step_{run.step:08d}")
        out = export_checkpoint(newest, run.folder / "model", weights="ema")
        run.monitor.artifact(out, f"{run.config.run.name}-depth-{run.engine.depth}", "model", lineage(run))
        log.info("model of depth %d: %s", run.engine.depth, out)
    run.monitor.finish()
