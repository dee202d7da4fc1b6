"""The training loop. `train` is the table of contents: one batch, or one pruning decision, from top to bottom."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, TrainConfig, to_dict, to_yaml
from entprune_ds.coordinator import Examples, run_check
from entprune_ds.data.latents import Batch
from entprune_ds.data.stream import Stream, merge_states
from entprune_ds.diffusion.objective import Draws, loss_per_example, make_draws
from entprune_ds.diffusion.samplers import SAMPLERS
from entprune_ds.engine.build import Engine, build_engine, fresh_state, initialize_fresh, train_step
from entprune_ds.engine.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    prune_old,
    read_checkpoint,
    save_checkpoint,
    write_text,
)
from entprune_ds.engine.resize import resize
from entprune_ds.engine.state import Piece, write_state
from entprune_ds.engine.view import ShardedView
from entprune_ds.environment import environment, launch_command
from entprune_ds.evaluation.generate import generate, make_labels
from entprune_ds.evaluation.images import save_grid
from entprune_ds.export import export_checkpoint
from entprune_ds.faults import check_space, explained, locked_run_folder, raise_on_signals
from entprune_ds.interop.safetensors import read_export, tensor_reader
from entprune_ds.logs import ProgressLine, get_logger, progress
from entprune_ds.models.registry import count_parameters
from entprune_ds.monitor.interface import Monitor
from entprune_ds.monitor.metrics import open_monitor, rewind_metrics
from entprune_ds.preflight import validation_spec
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.schedule import check_steps
from entprune_ds.validation import validation_loss

log = get_logger()


@dataclass
class Run:
    """Everything that a step of the loop may touch. What a resume restores: engine, stream, step, decisions."""

    config: Config
    engine: Engine
    stream: Stream
    monitor: Monitor
    step: int = 0
    """Optimizer steps done."""
    decisions: list[PruneDecision] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    """Steps before which a pruning check stands."""
    validation: Draws | None = None
    started: float = 0.0
    """Monotonic seconds at the last throughput measurement."""
    saved: int = -1
    """Step of the newest checkpoint."""
    validated: tuple[int, int] = (-1, -1)
    """Step and depth of the newest validation."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run_dir


def train(config: Config, arguments: list[str]) -> None:
    """Train, prune and hand over: the whole run of one rank. Collective over the job.

    Args:
        config: resolved and checked.
        arguments: the words of the command line, kept for "how to reproduce".
    """
    raise_on_signals()
    with explained(config.run_dir):
        joined = comm.init(config.run.timeout_seconds)
        with locked_run_folder(config.run_dir):
            run = open_run(config, arguments)
            try:
                loop(run)
                finish(run)
            except BaseException:
                run.monitor.finish(exit_code=1)
                raise
        if joined:
            comm.shutdown()


def loop(run: Run) -> None:
    """Optimizer steps, with a pruning check before each step of `run.checks`."""
    config = run.config
    with progress("train", total=config.train.num_steps, done=run.step) as line:
        run.started = time.monotonic()
        while run.step < config.train.num_steps:
            if run.step in run.checks and len(run.decisions) <= run.checks.index(run.step):
                prune_check(run)
            loss = one_step(run)
            if run.step % config.monitor.log_every == 0:
                log_step(run, loss, line)
            if config.train.validate_every and run.step % config.train.validate_every == 0:
                validate(run)
            if config.monitor.sample_every and run.step % config.monitor.sample_every == 0:
                sample_grid(run, "training")
            if run.step % config.train.checkpoint_every == 0:
                checkpoint(run)


def one_step(run: Run) -> Tensor:
    """One optimizer step; returns this rank's mean loss, not yet synchronised."""
    config, engine = run.config, run.engine
    batch = next_batch(run)
    draws = make_draws(
        batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose="train", step=run.step,
        label_dropout=config.train.label_dropout, null_label=config.model.num_classes,
    )  # fmt: skip
    engine.set_learning_rate(learning_rate(config.train, run.step))
    loss, _ = train_step(engine, draws.split(engine.ds.train_micro_batch_size_per_gpu()), loss_per_example)
    engine.update_ema(config.train.ema_decay)
    run.step += 1
    return loss


def next_batch(run: Run) -> Batch:
    """This rank's part of the next global batch; a damaged shard ends the job on all ranks."""
    try:
        return run.stream.next_batch()
    except (ValueError, OSError) as problem:
        raise comm.DistributedError(f"step {run.step}: {problem}") from problem


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine down to min_learning_rate; a pure function of the step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.learning_rate
    share = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    half = 0.5 * (1 + math.cos(math.pi * share))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * half


# ---------------------------------------------------------------- pruning


def prune_check(run: Run) -> None:
    """Score, vote, decide; then resize every rank's shard in place, and go on."""
    config, engine, check = run.config, run.engine, run.checks.index(run.step)
    checkpoint(run)
    log.info("check %d of %d at step %d: scoring %d blocks", check + 1, len(run.checks), run.step, engine.depth)
    parts = ShardedView(engine, "weight", getattr(torch, config.prune.score_dtype))
    decision, times = run_check(
        parts, engine.kept_blocks, config, check, run.step, len(config.model.blocks), examples_of(config, check)
    )
    del parts
    record_decision(run, decision)
    run.monitor.log(run.step, {"prune/score_seconds": times.sweep, "prune/vote_seconds": times.vote})
    log.info("check %d: %s Blocks removed: %s", check + 1, decision.reason, list(decision.dropped) or "none")
    if decision.score_only or not decision.dropped:
        return
    validate(run)
    sample_grid(run, f"check_{check}_before")
    run.engine, seconds = resize(engine, config, decision.kept_blocks)
    log.info("resized to depth %d in %.2f s, optimizer state kept", run.engine.depth, seconds)
    run.monitor.log(run.step, {"prune/resize_seconds": seconds})
    validate(run)
    sample_grid(run, f"check_{check}_after")
    run.started = time.monotonic()


def examples_of(config: Config, check: int) -> Examples:
    """Calibration examples by purpose, equal on all ranks and apart from the training cursor."""
    streams: dict[str, Stream] = {}

    def examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        if purpose not in streams:
            streams[purpose] = Stream(
                config.data.shards, seed=config.run.seed, num_readers=1, shuffle_buffer=config.data.shuffle_buffer,
                global_batch_size=count, purpose=f"{purpose}/{check}",
            )  # fmt: skip
        batch = streams[purpose].next_batch()
        return batch.latents, batch.labels

    return examples


def record_decision(run: Run, decision: PruneDecision) -> None:
    """Append the decision to decisions.jsonl and show it."""
    run.decisions.append(decision)
    if comm.is_main():
        write_decisions(run.folder / "decisions.jsonl", run.decisions)
    run.monitor.decision(decision.to_json())


def write_decisions(path: Path, decisions: list[PruneDecision]) -> None:
    """Write decisions.jsonl; lines that a resume has left behind move to decisions.superseded.jsonl."""
    lines = [json.dumps(d.to_json(), allow_nan=False) for d in decisions]
    old = path.read_text().splitlines() if path.is_file() else []
    aside = [line for line in old if line not in lines]
    if aside:
        with open(path.with_name("decisions.superseded.jsonl"), "a") as file:
            file.write("\n".join(aside) + "\n")
    write_text(path, "".join(line + "\n" for line in lines))


# ---------------------------------------------------------------- seeing it


def log_step(run: Run, loss: Tensor, line: ProgressLine) -> None:
    """Log the loss of this step over all ranks, and the throughput since the last log."""
    config, engine = run.config, run.engine
    mean = (comm.all_reduce_sum(loss.clone()) / comm.world_size()).item()
    now = time.monotonic()
    seconds, run.started = (now - run.started) / config.monitor.log_every, now
    rate = config.train.global_batch_size / seconds
    norm = engine.ds.get_global_grad_norm()
    values = {
        "train/loss": mean, "train/lr": learning_rate(config.train, run.step - 1), "train/depth": engine.depth,
        "train/examples_per_second": rate, "train/step_seconds": seconds,
    }  # fmt: skip
    if norm is not None:
        values["train/grad_norm"] = float(norm)
    run.monitor.log(run.step, values)
    line.update(run.step, f"loss {mean:.4f}  depth {engine.depth}  {rate:.0f} examples/s")
    if not math.isfinite(mean):
        message = f"the loss is {mean} at step {run.step}. Lower train.learning_rate or check the data, then run the "
        raise comm.DistributedError(message + "same command: it resumes from the newest checkpoint.")


def validate(run: Run) -> None:
    """Validation loss of the raw and the EMA weights on fixed draws."""
    if run.validation is None or run.validated == (run.step, run.engine.depth):
        return
    run.validated = (run.step, run.engine.depth)
    values = {
        f"train/validation_loss{suffix}": validation_loss(ShardedView(run.engine, key), run.validation)
        for key, suffix in (("weight", ""), ("ema", "_ema"))
    }
    run.monitor.log(run.step, values | {"train/depth": run.engine.depth})
    log.info("step %d: validation loss %.5f, EMA %.5f", run.step, *values.values())


def sample_grid(run: Run, name: str) -> None:
    """Samples of the EMA weights as a PNG; every rank draws its share. Skipped for latents of other than 1 or 3 channels."""
    config, model = run.config, run.config.model
    if model.in_channels not in (1, 3):
        return
    count = -(-config.sample.grid // comm.world_size()) * comm.world_size()
    labels = make_labels("balanced", count, model.num_classes, config.sample.seed).to(comm.device())
    view, sampler = ShardedView(run.engine, "ema"), SAMPLERS[config.sample.sampler]
    shape = (model.in_channels, model.input_size, model.input_size)
    mine = range(comm.rank(), count, comm.world_size())
    images = generate(
        lambda noise, y: sampler(view, noise, y, config.sample.num_steps), labels[mine.start :: comm.world_size()],
        shape=shape, seed=config.sample.seed, batch_size=config.sample.batch_size, slots=list(mine),
    )  # fmt: skip
    parts = comm.all_gather(torch.from_numpy(images).to(comm.device()))
    if comm.is_main():
        whole = torch.stack(parts, dim=1).flatten(0, 1)[: config.sample.grid].cpu().numpy()
        path = run.folder / "samples" / f"step_{run.step:08d}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(whole, path)
        run.monitor.image(run.step, f"samples/{name}", path)


# ---------------------------------------------------------------- opening, saving, finishing


def open_run(config: Config, arguments: list[str]) -> Run:
    """Build or resume: engine, data cursor, decisions. Collective."""
    folder, root = config.run_dir, config.run_dir / "checkpoints"
    found = find_checkpoint(root, log.warning)
    model_config = replace(config.model, kept_blocks=config.model.blocks)
    if config.model.weights and found is None:
        exported, _ = read_export(Path(config.model.weights))
        model_config = replace(model_config, kept_blocks=config.model.kept_blocks or exported.blocks)
    if found is not None:
        model_config = replace(model_config, kept_blocks=found.kept_blocks)
    engine = build_engine(config, model_config)
    stream = Stream(
        config.data.shards, seed=config.run.seed, num_readers=config.data.num_readers,
        shuffle_buffer=config.data.shuffle_buffer, global_batch_size=config.train.global_batch_size,
        dp_rank=comm.rank(), dp_size=comm.world_size(), verify=True,
    )  # fmt: skip
    step, decisions = 0, []
    if found is not None:
        load_checkpoint(engine, found)
        step, record = found.step, found.manifest["record"]
        stream.load_state(record["stream"])
        decisions = [PruneDecision.from_json(d) for d in record["decisions"]]
        log.info("resumed from %s: step %d, depth %d", found.folder, step, engine.depth)
    elif config.model.weights:
        load_weights(engine, Path(config.model.weights))
        log.info("started from %s at depth %d", config.model.weights, engine.depth)
    else:
        initialize_fresh(engine, config.run.seed)
    monitor = open_folder(config, arguments, step, decisions)
    run = Run(config, engine, stream, monitor, step=step, decisions=decisions, checks=planned_checks(config))
    run.saved = step if found is not None else -1
    run.validation = validation_draws(config)
    return run


def open_folder(config: Config, arguments: list[str], step: int, decisions: list[PruneDecision]) -> Monitor:
    """Write config.yaml and env.json, move aside what lies after `step`, and open the monitor (rank 0)."""
    folder, error = config.run_dir, None
    if comm.is_main():
        try:
            error = check_space(folder, needed_bytes=2 * 16 * count_parameters(config.model))
            write_text(folder / "config.yaml", to_yaml(config))
            command = launch_command(arguments, comm.world_size())
            write_text(folder / "env.json", json.dumps(environment(config, comm.world_size(), command), indent=2))
            rewind_metrics(folder, step)
            write_decisions(folder / "decisions.jsonl", decisions)
        except OSError as problem:
            error = f"run folder {folder} cannot be written: {problem}. Free space or choose another `run.root`."
    comm.raise_together(error)
    return open_monitor(config, folder, comm.is_main())


def load_weights(engine: Engine, folder: Path) -> None:
    """Fill a new engine from an exported model: zero moments, EMA equal to the weights. Collective."""
    tensor = tensor_reader(folder)

    def read(piece: Piece) -> dict[str, Tensor]:
        return fresh_state(tensor(piece.name).reshape(-1)[piece.start : piece.stop].clone())

    write_state(engine.ds, engine.optimizer, engine.ema, 0, read)


def planned_checks(config: Config) -> list[int]:
    """Steps of the pruning checks; none without a target depth."""
    prune = config.prune
    if prune.target_depth is None:
        return []
    return check_steps(prune.start_step, prune.end_step or config.train.num_steps, prune.num_checks)


def validation_draws(config: Config) -> Draws | None:
    """The fixed (example, t, noise) draws, or None without a validation set."""
    spec = validation_spec(config)
    if not spec or not config.train.validate_every:
        return None
    count = config.train.validation_draws
    stream = Stream(
        spec, seed=config.run.seed, num_readers=1, shuffle_buffer=config.data.shuffle_buffer,
        global_batch_size=count, purpose="validation",
    )  # fmt: skip
    batch = stream.next_batch()
    return make_draws(batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose="validation", step=0)


def checkpoint(run: Run) -> None:
    """Save the run; keep the newest ones and those before a removal. Collective."""
    if run.saved == run.step:
        return
    record = {
        "stream": merge_states(comm.all_gather_json(run.stream.state())),
        "decisions": [d.to_json() for d in run.decisions],
        "config": to_dict(run.config),
    }
    root = run.folder / "checkpoints"
    save_checkpoint(run.engine, root, run.step, record)
    run.saved = run.step
    if comm.is_main():
        before_removal = {d.step for d in run.decisions if d.dropped} | {run.step}
        prune_old(root, run.config.train.keep_checkpoints, before_removal)


def finish(run: Run) -> None:
    """Last validation, samples and checkpoint; the export is made from that checkpoint."""
    validate(run)
    sample_grid(run, "final")
    checkpoint(run)
    if comm.is_main():
        newest = read_checkpoint(run.folder / "checkpoints" / f"step_{run.step:08d}")
        out = export_checkpoint(newest, run.folder / "model", weights="ema")
        run.monitor.artifact(out, f"{run.config.run.name}-depth-{run.engine.depth}", "model")
        log.info("model of depth %d: %s", run.engine.depth, out)
    run.monitor.finish()
