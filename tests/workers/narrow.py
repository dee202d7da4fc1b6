"""Worker functions of test_narrow.py: run on every rank by tests.ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from entprune_ds import comm, trainer
from entprune_ds.config import Config, load_config
from entprune_ds.coordinator import CheckTimes
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.resize import resize
from entprune_ds.engine.view import ShardedView, gather_full
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.surgery import Narrowing
from entprune_ds.run_state import checkpoint, open_run
from tests.tiny import tiny_draws
from tests.workers.pipeline import load_state, pipe_config, save_state, train_steps
from tests.workers.resize import STEPS_AFTER, STEPS_BEFORE, fill, gathered_ema

HEADS, HEAD_SIZE = 4, 8


def narrow_config(zero_stage: int, dtype: str, stages: int) -> Config:
    """The tiny config with four heads of eight channels."""
    return pipe_config(zero_stage, dtype, stages, num_heads=HEADS)


def of(step: dict) -> dict[int, Narrowing]:
    """Narrowings from their JSON."""
    return {int(block): Narrowing(**stays) for block, stays in step["narrow"].items()}


def live(folder: str, zero_stage: int, dtype: str, stages: int, resizes: list[dict]) -> dict:
    """Train, write the state by public calls, drop and narrow blocks (several times), go on for 20 steps."""
    config, traffic, first = narrow_config(zero_stage, dtype, stages), [], 0
    engine = build_engine(config, config.model, (2, 2) if stages == 2 else None)
    initialize_fresh(engine, config.run.seed)
    for step in resizes:
        train_steps(engine, config, first, STEPS_BEFORE)
        first += STEPS_BEFORE
        save_state(engine, folder, "before")
        cut = step.get("cut") and tuple(step["cut"])
        engine, report = resize(engine, config, tuple(step["kept"]), cut, of(step))
        traffic.append([report.bytes_state, report.bytes_minimum])
    found = {"traffic": traffic, "widths": engine.model_config.block_widths, "steps": first}
    found |= {"count": engine.ema_count, "seen": seen_alike(engine, config), "costs": engine.costs is not None}
    found["losses"] = train_steps(engine, config, first, STEPS_AFTER)
    save_state(engine, folder, "live")
    return found


def seen_alike(engine: Engine, config: Config) -> bool:
    """Whether scoring, which takes one block after the other into one place, sees the weights of every width."""
    model = DiT(engine.model_config)
    model.load_state_dict({n: gather_full(engine, [n], "weight")[n].cpu() for n in engine.shapes})
    draws = tiny_draws(config, 0, 0, 1)
    with torch.no_grad():
        return torch.equal(
            ShardedView(engine)(draws.z_t, draws.t, draws.labels), model(draws.z_t, draws.t, draws.labels)
        )


def fresh(folder: str, zero_stage: int, dtype: str, stages: int, last: dict, widths: list, steps: int,
          mutations: list[str]) -> dict:  # fmt: skip
    """Another launch: build the narrow model directly, set its state, train 20 steps; once per mutation."""
    config, losses = narrow_config(zero_stage, dtype, stages), {}
    model = replace(config.model, kept_blocks=tuple(last["kept"]), block_widths=tuple(tuple(w) for w in widths))
    for mutation in mutations:
        engine = build_engine(config, model, tuple(last["cut"]) if last.get("cut") else None)
        state = {name: by_hand(name, t, last, mutation) for name, t in load_state(folder, "before").items()}
        fill(engine, state, steps, mutation)
        losses[mutation] = train_steps(engine, config, steps, STEPS_AFTER)
        save_state(engine, folder, f"fresh_{mutation}")
        destroy_engine(engine)
    return losses


def by_hand(name: str, tensor: torch.Tensor, step: dict[str, Any], mutation: str) -> torch.Tensor:
    """What stays of a full state tensor "KEY/blocks.N.*", written without the code under test."""
    _, _, rest = name.partition("blocks.")
    block, _, inner = rest.partition(".")
    stays = step["narrow"].get(block, {})
    heads, channels, width = stays.get("heads"), stays.get("channels"), 32
    if mutation == "other_heads" and heads:
        heads = [head - 1 for head in heads]  # the last one for the first
    if mutation == "first_channels" and channels:
        channels = list(range(len(channels)))
    if heads and inner.startswith("attn.qkv"):
        q, k, v = tensor.reshape(3, -1, HEAD_SIZE, *tensor.shape[1:])[:, heads]
        parts = [k, q, v] if mutation == "swapped_qk" else [q, k, v]
        return torch.stack(parts).reshape(-1, *tensor.shape[1:]).contiguous()
    if heads and inner == "attn.proj.weight":
        return tensor.reshape(width, -1, HEAD_SIZE)[:, heads].reshape(width, -1).contiguous()
    if channels and inner.startswith("mlp.fc1"):
        return tensor[channels].contiguous()
    if channels and inner == "mlp.fc2.weight":
        return tensor[:, channels].contiguous()
    return tensor


def refusals(zero_stage: int) -> dict:
    """What resize() says to impossible narrowings; the engine must still train afterwards, with the state of before."""
    config, messages = narrow_config(zero_stage, "fp32", 1), []
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    train_steps(engine, config, 0, 1)
    before = gathered_ema(engine)
    everything = tuple(range(4))
    requests = [
        (everything, {1: Narrowing(heads=())}),
        (everything, {1: Narrowing(heads=(0, 4))}),
        (everything, {1: Narrowing(channels=(1, 1)), 9: Narrowing(heads=(0,)), 2: Narrowing(heads=(1, 0))}),
        ((0, 2, 3), {1: Narrowing(heads=(0,))}),
        (everything, {1: Narrowing(heads=(0, 1, 2, 3))}),
        (everything, {1: Narrowing(heads=(-1, 0))}),
    ]
    for kept, narrow in requests:
        try:
            resize(engine, config, kept, narrow=narrow)
        except ValueError as error:
            messages.append(str(error))
    different = Narrowing(heads=(0, 1)) if comm.is_main() else Narrowing(heads=(0, 9))
    try:
        resize(engine, config, everything, narrow={1: different})
    except comm.DistributedError as error:
        messages.append(str(error))
    after = gathered_ema(engine)
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return {"messages": messages, "same": same, "losses": train_steps(engine, config, 1, 2)}


def run_and_resume(words: list[str], narrow: dict) -> dict:
    """A check that narrows, two steps, a checkpoint and two more steps; then the same run again by its command."""
    from entprune_ds.cli.train import main

    config = load_config(words)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    run, losses, found = open_run(config, words), [], trainer.run_check

    def narrows_only(*args: Any, **kwargs: Any) -> tuple[PruneDecision, CheckTimes]:
        """What a criterion of heads and channels would decide; there is none yet."""
        decision, times = found(*args, **kwargs)
        stay = {"dropped": (), "kept_blocks": decision.kept_before, "chosen_depth": len(decision.kept_before)}
        return replace(decision, narrow=of({"narrow": narrow}), **stay), times

    trainer.run_check = narrows_only
    trainer.prune_check(run)
    trainer.run_check = found
    for _ in range(2):
        trainer.one_step(run)
    checkpoint(run)
    for _ in range(2):
        losses.append(comm.all_reduce_sum(trainer.one_step(run)).item() / comm.world_size())
    run.monitor.finish(exit_code=1)
    run.stream.close()
    destroy_engine(run.engine)
    return {"losses": losses, "status": main(words)}
