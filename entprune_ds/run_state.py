"""One run in memory and on disk: opened or resumed, its checkpoints and its decision log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig, to_stored
from entprune_ds.data.stream import Stream, merge_states
from entprune_ds.diffusion.objective import Draws, Objective, build_objective
from entprune_ds.engine.balance import Cut
from entprune_ds.engine.build import Engine, build_engine, fresh_state, initialize_fresh
from entprune_ds.engine.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    prune_old,
    save_checkpoint,
    step_folders,
)
from entprune_ds.engine.ds_config import stages_at
from entprune_ds.engine.layer_costs import LayerCosts, costs_as_json, costs_from_json
from entprune_ds.engine.state import Piece, write_state
from entprune_ds.interop.finite import non_finite, non_finite_problem
from entprune_ds.interop.weights import opened
from entprune_ds.latent_pictures import LatentDecoder, no_grids
from entprune_ds.logs import get_logger
from entprune_ds.loss_guard import LossGuard
from entprune_ds.monitor.interface import Monitor
from entprune_ds.monitor.metrics import metrics_size
from entprune_ds.preflight import validation_spec
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.schedule import planned_checks
from entprune_ds.pruning.soft_mask import SoftState
from entprune_ds.pruning.trend import Validation, validations_from
from entprune_ds.recovery import PlainRecovery, Recovery, open_recovery
from entprune_ds.rollback import roll_back, step_of
from entprune_ds.run_files import open_folder, write_decisions
from entprune_ds.soft_pruning import open_soft

log = get_logger()


@dataclass
class Run:
    """Everything that a step of the loop may touch. What a resume restores: engine, stream, step, decisions, soft."""

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
    saved: int = -1
    """Step of the newest checkpoint."""
    reading: bool = False
    """Whether the stream of this start has given a batch."""
    validated: tuple[int, int] = (-1, -1)
    """Step and depth of the newest validation."""
    counted: ModelConfig | None = None
    """Architecture whose training step has been counted (monitor.count_macs)."""
    soft: SoftState | None = None
    """The mask of soft pruning."""
    recovery: Recovery = field(default_factory=PlainRecovery)
    """How the loop trains: alone or with a teacher."""
    validations: list[Validation] = field(default_factory=list)
    """Validation losses of the training weights so far."""
    guard: LossGuard = field(default_factory=lambda: LossGuard(0))
    """Which steps count."""
    arguments: list[str] = field(default_factory=list)
    """The words of the command line."""
    fixed_batch: Draws | None = None
    """What the norms of the blocks are measured on, once it has been read."""
    decoder: LatentDecoder = field(default_factory=LatentDecoder)
    """Makes pictures of the latents of sample grids."""

    @property
    def last_removal(self) -> int | None:
        """Step of the last removal; None before any."""
        return max((d.step for d in self.decisions if d.removes and not d.score_only), default=None)

    @property
    def objective(self) -> Objective:
        """What the training minimises."""
        return build_objective(self.config.model, self.config.diffusion)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run_dir


def open_run(config: Config, arguments: list[str]) -> Run:
    """Build or resume: engine, data cursor, decisions. Collective."""
    roll_back(config)
    if why := no_grids(config):
        log.info("%s", why)
    return run_from(config, arguments, find_checkpoint(config.run_dir / "checkpoints", log.warning))


def run_from(config: Config, arguments: list[str], found: Checkpoint | None) -> Run:
    """The run as a checkpoint has it, or a new one. Collective."""
    model_config = config.model if found is None else found.model(config.model)
    engine = build_engine(config, model_config, *saved_cut(config, found))
    stream = open_stream(config, engine)
    step, decisions, metrics_bytes, validations = 0, [], 0, []  # a run from the start keeps no earlier line
    if found is not None:
        load_checkpoint(engine, found)
        step, record = found.step, found.manifest["record"]
        try:
            stream.load_state(record["stream"])
        except ValueError as problem:  # the same on all ranks
            raise comm.DistributedError(f"{found.folder}: {problem}") from problem
        decisions = [PruneDecision.from_json(d) for d in record["decisions"]]
        metrics_bytes, validations = record.get("metrics_bytes"), validations_from(record.get("validations", []))
        log.info("resumed from %s: step %d, depth %d", found.folder, step, engine.depth)
        before = record["config"]["model"]["weights"]
        if config.model.weights != before:
            text = "model.weights=%s is not read: this run was started from %s and goes on. For other weights, choose "
            log.warning(text + "another run.name.", config.model.weights, before or "random weights")
    elif config.model.weights:
        load_weights(engine, Path(config.model.weights), config.model)
        log.info("started from %s at depth %d", config.model.weights, engine.depth)
    else:
        initialize_fresh(engine, config.run.seed)
    recovery = open_recovery(config, engine, {} if found is None else found.manifest["record"])
    monitor = open_folder(config, arguments, step, decisions, metrics_bytes)
    run = Run(config, engine, stream, monitor, step=step, decisions=decisions, checks=planned_checks(config))
    run.recovery = recovery
    run.saved = step if found is not None else -1
    run.validation, run.validations = validation_draws(config), validations
    if validations and validations[-1][0] == step:  # it stands in the metrics already
        run.validated = (step, engine.depth)
    run.soft = open_soft(config, engine, None if found is None else found.manifest["record"].get("soft"))
    guarded = None if found is None else found.manifest["record"].get("guard")
    run.guard, run.arguments = LossGuard.from_json(config.train.spike_deviations, guarded), arguments
    if not config.train.bad_steps:
        run.guard.in_a_row = 0  # nobody counts: what follows ends the row
    return run


def saved_cut(config: Config, found: Checkpoint | None) -> tuple[Cut | None, LayerCosts | None]:
    """The pipeline's cut at the checkpoint and what it was made from, to be used again where the same holds."""
    record = {} if found is None else found.manifest["record"]
    cut, costs = record.get("cut"), costs_from_json(record.get("costs"))
    if found is None or cut is None or len(cut) != stages_at(config, comm.world_size(), len(found.kept_blocks)):
        return None, None
    if costs is not None and not costs.know(config, found.model(config.model), comm.world_size() // len(cut)):
        return None, None  # another micro-batch, precision or switch than before: measured and cut again
    return tuple(cut), costs


def open_stream(config: Config, engine: Engine) -> Stream:
    """The training examples of this data-parallel rank."""
    return Stream(
        config.data.shards, seed=config.run.seed, num_readers=config.data.num_readers,
        shuffle_buffer=config.data.shuffle_buffer, global_batch_size=config.train.global_batch_size,
        dp_rank=engine.dp_rank, dp_size=engine.dp_size, verify=True, flip=config.data.flip,
        latent_scale=config.data.latent_scale, num_workers=config.data.num_workers, prefetch=config.data.prefetch,
        max_skipped=config.data.max_skipped, allow_pipe=config.data.allow_pipe,
    )  # fmt: skip


def stream_state(run: Run) -> dict[str, Any]:
    """The data cursor of the whole job: that of the first stages, one per data-parallel rank. Collective."""
    states = comm.all_gather_json(run.stream.state() if run.engine.pipe_stage == 0 else None)
    return merge_states(state for state in states if state is not None)


def reopen_stream(run: Run, state: dict[str, Any]) -> None:
    """Go on from a data cursor with the data-parallel ranks of now."""
    run.stream.close()
    run.stream = open_stream(run.config, run.engine)
    run.stream.load_state(state)


def load_weights(engine: Engine, path: Path, model: ModelConfig) -> None:
    """Fill a new engine from a model of any known format: zero moments, EMA equal to the weights. Collective.

    Raises:
        DistributedError: on all ranks, when one cannot read the weights, or they hold NaN or infinite values.
    """
    error, counts = None, []
    try:
        tensor = opened(path, model).read
    except (OSError, ValueError) as problem:
        error = f"`model.weights`: {problem}"
    comm.raise_together(error)

    def read(piece: Piece) -> dict[str, Tensor]:
        weight = tensor(piece.name).reshape(-1)[piece.start : piece.stop].clone()
        counts.append([piece.name, piece.start, non_finite(weight)])
        return fresh_state(weight)

    write_state(engine.ds, engine.optimizer, engine.ema, 0, read)
    pieces = {(name, start): count for part in comm.all_gather_json(counts) for name, start, count in part}
    of_tensor = dict.fromkeys(engine.shapes, 0)
    for (name, _), count in pieces.items():  # a piece that several ranks hold counts once
        of_tensor[name] += count
    comm.raise_together(non_finite_problem(f"`model.weights` ({path})", of_tensor))


def validation_draws(config: Config) -> Draws | None:
    """The fixed (example, t, noise) draws, or None without a validation set."""
    spec = validation_spec(config)
    if not spec or not config.train.validate_every:
        return None
    count = config.train.validation_draws
    stream = Stream(
        spec, seed=config.run.seed, num_readers=1, shuffle_buffer=config.data.shuffle_buffer,
        global_batch_size=count, purpose="validation", latent_scale=config.data.latent_scale,
        max_skipped=config.data.max_skipped, allow_pipe=config.data.allow_pipe,
    )  # fmt: skip
    try:
        batch = stream.next_batch()
    except (ValueError, OSError) as problem:
        raise comm.RankError(f"validation: {problem}") from problem
    objective = build_objective(config.model, config.diffusion)
    return objective.make_draws(
        batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose="validation", step=0
    )


def checkpoint(run: Run) -> None:
    """Save the run; keep the newest ones, those before a removal, and the one before bad steps. Collective."""
    if run.saved == run.step:
        return
    record = {
        "stream": stream_state(run),
        "cut": run.engine.cut,
        "costs": costs_as_json(run.engine.costs),
        "decisions": [d.to_json() for d in run.decisions],
        "soft": None if run.soft is None else run.soft.to_json(),
        "guard": run.guard.to_json(),
        "config": to_stored(run.config),
        "metrics_bytes": metrics_size(run.folder),
        "teacher": run.recovery.digest,
        "validations": [[step, size, v if math.isfinite(v) else None] for step, size, v in run.validations],
    }
    root = run.folder / "checkpoints"
    save_checkpoint(run.engine, root, run.step, record)
    run.saved = run.step
    if comm.is_main():
        kept = {d.step for d in run.decisions if d.removes and not d.score_only}
        good = [s for s in (step_of(f.name) for f in step_folders(root)) if s <= run.step - run.guard.in_a_row]
        prune_old(root, run.config.train.keep_checkpoints, {*kept, *good[-1:]})  # a roll-back goes to that one


def record_decision(run: Run, decision: PruneDecision) -> None:
    """Append the decision to decisions.jsonl and show it."""
    run.decisions.append(decision)
    if comm.is_main():
        write_decisions(run.folder / "decisions.jsonl", run.decisions)
    run.monitor.decision(decision.to_json())
