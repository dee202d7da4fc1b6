"""What a run shows while it goes: training metrics, validation losses, sample grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import digest, to_stored
from entprune_ds.diffusion.sampling import build_sampler
from entprune_ds.engine.view import ShardedView
from entprune_ds.environment import commit
from entprune_ds.evaluation.generate import NoiseAt, drawn_batches, make_labels
from entprune_ds.evaluation.images import save_grid, to_uint8
from entprune_ds.latent_pictures import no_grids
from entprune_ds.learning_rate import learning_rate
from entprune_ds.logs import ProgressLine, get_logger
from entprune_ds.mac_counter import MacCounter
from entprune_ds.redact import redacted
from entprune_ds.run_state import Run
from entprune_ds.step_metrics import step_values
from entprune_ds.validation import validation_loss

log = get_logger()


def log_step(run: Run, loss: Tensor, line: ProgressLine) -> None:
    """Log the loss of this step over all ranks, and where the time since the last log went."""
    config, engine = run.config, run.engine
    skipped_here = run.stream.num_skipped if engine.pipe_stage == 0 else 0  # all stages read the same examples
    sums = comm.all_reduce_sum(torch.stack([loss, loss.new_tensor(skipped_here)]))
    mean, skipped = (sums[0] / comm.world_size()).item(), int(sums[1].item())
    norm = engine.ds.get_global_grad_norm()
    values = {
        "train/loss": mean, "train/lr": learning_rate(config.train, run.step - 1), "train/depth": engine.depth,
        "data/skipped": skipped,
    }  # fmt: skip
    values |= step_values(run)
    if norm is not None:
        values["train/grad_norm"] = float(norm)
    values |= run.recovery.metrics(engine)
    run.monitor.log(run.step, values)
    rate = values["train/examples_per_second"]
    line.update(run.step, f"loss {mean:.4f}  depth {engine.depth}  {rate:.0f} examples/s")
    if not math.isfinite(mean) and not config.train.bad_steps:
        message = f"the loss is {mean} at step {run.step}. Check the data, or lower train.learning_rate and start "
        raise comm.DistributedError(message + "under another run.name; the checkpoints of this run stay as they are.")


def validate(run: Run) -> None:
    """Validation loss of the raw and the EMA weights on fixed draws."""
    if run.validation is None or run.validated == (run.step, run.engine.depth):
        return
    run.validated = (run.step, run.engine.depth)
    values = {
        f"train/validation_loss{suffix}": validation_loss(ShardedView(run.engine, key), run.validation, run.objective)
        for key, suffix in (("weight", ""), ("ema", "_ema"))
    }
    size = sum(math.prod(shape) for shape in run.engine.shapes.values())
    run.validations.append((run.step, size, values["train/validation_loss"]))
    run.monitor.log(run.step, values | {"train/depth": run.engine.depth})
    log.info("step %d: validation loss %.5f, EMA %.5f", run.step, *values.values())


def log_macs(run: Run, name: str, counter: MacCounter | None) -> None:
    """Log the multiply-accumulates of all ranks together, where they were counted. Collective."""
    if counter is not None:
        macs = comm.all_reduce_sum(torch.tensor([counter.macs], dtype=torch.int64, device=comm.device()))
        run.monitor.log(run.step, {name: int(macs.item())})


def lineage(run: Run) -> dict[str, Any]:
    """What the exported model was made from, as plain values."""
    config = run.config
    return {
        "base_weights": redacted(config.model.weights), "data": redacted(str(config.data.shards)),
        "data_digest": run.stream.index.digest, "config_digest": digest(to_stored(config)), "commit": commit(),
        "step": run.step, "depth": run.engine.depth, "kept_blocks": list(run.engine.kept_blocks),
        "decisions": [d.digest for d in run.decisions],
    }  # fmt: skip


def sample_grid(run: Run, name: str, watch: Callable[[int, str], None] = lambda done, text: None) -> None:
    """Samples of the EMA weights as a PNG; every rank draws its share, rank 0 decodes latents. Skipped if `no_grids`.

    A picture that cannot be drawn or written is a warning: the training goes on.

    Args:
        run: the run.
        name: of the picture.
        watch: called at every evaluation of the model with the pictures that are done over all ranks, and a text.
    """
    config, model = run.config, run.config.model
    if no_grids(config):
        return
    count = -(-config.sample.grid // comm.world_size()) * comm.world_size()
    labels = make_labels("balanced", count, model.num_classes, config.sample.seed).to(comm.device())
    sampler = build_sampler(model, config.diffusion, config.sample, anyone=_on_any_rank)
    view, diverged = ShardedView(run.engine, "ema"), []
    done = evaluations = 0

    def watched(z: Tensor, t: Tensor, y: Tensor) -> Tensor:  # (n,C,H,W), (n,), (n,) -> (n,C',H,W)
        nonlocal evaluations
        evaluations += 1
        comm.mark_progress()  # samplers take hundreds of evaluations without meeting another rank
        watch(done, f"{evaluations} evaluations of the model")
        return view(z, t, y)

    def draw(noise: Tensor, y: Tensor, noise_at: NoiseAt) -> Tensor:  # (n,C,H,W), (n,) -> (n,C,H,W)
        nonlocal done
        found = sampler(watched, noise, y, noise_at)
        done += len(y) * comm.world_size()  # the ranks draw in step
        watch(min(done, config.sample.grid), f"{evaluations} evaluations of the model")
        diverged.append(not bool(torch.isfinite(found).all()))
        return torch.nan_to_num(found)

    drawn = drawn_batches(
        draw, labels[comm.rank() :: comm.world_size()],
        shape=(model.in_channels, model.input_size, model.input_size), seed=config.sample.seed,
        batch_size=config.sample.batch_size, slots=range(comm.rank(), count, comm.world_size()),
    )  # fmt: skip
    parts = comm.all_gather(torch.cat(list(drawn)))
    if _on_any_rank(any(diverged)):
        log.warning("step %d: samples contain NaN or infinite values, drawn as 0 in the grid", run.step)
    if comm.is_main():
        whole = torch.stack(parts, dim=1).flatten(0, 1)[: config.sample.grid]
        path = run.folder / "samples" / f"step_{run.step:08d}_{name}.png"
        try:
            save_grid(to_uint8(run.decoder.pictures(whole, config.sample)), path)
        except (ValueError, torch.OutOfMemoryError) as problem:
            log.warning("step %d: no sample grid: %s The training goes on.", run.step, " ".join(str(problem).split()))
            return
        run.monitor.image(run.step, f"samples/{name}", path)


def _on_any_rank(here: bool) -> bool:
    """Whether something holds on any rank. Collective."""
    return any(comm.all_gather_json(here))
