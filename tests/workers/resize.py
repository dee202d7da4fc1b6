"""Worker functions of test_resize.py: run on every rank by tests.ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh, train_step
from entprune_ds.engine.resize import resize
from entprune_ds.engine.state import create_adam_state, push_weights
from entprune_ds.engine.view import gather_full
from entprune_ds.models.layers import position_embedding
from tests.tiny import tiny_config, tiny_draws

STEPS_AFTER = 20


def train_steps(engine: Engine, config: Config, first: int, count: int) -> list[str]:
    """Train some steps; returns this rank's losses as exact hexadecimal text."""
    losses = []
    for step in range(first, first + count):
        draws = tiny_draws(config, step, comm.rank(), comm.world_size())
        loss, _ = train_step(engine, [draws], FlowObjective().loss)
        engine.update_ema(config.train.ema_decay)
        losses.append(loss.item().hex())
    return losses


def public_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and moments through DeepSpeed's public calls (at stage 0 its plain optimizer), not our state code."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, p in engine.ds.module.named_parameters():
        if isinstance(engine.ds.optimizer, torch.optim.Optimizer):
            values = [p.detach(), engine.optimizer.state[p]["exp_avg"], engine.optimizer.state[p]["exp_avg_sq"]]
        else:
            moments = [safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")]
            values = [safe_get_full_fp32_param(p), *moments]
        for key, value in zip(("weight", "exp_avg", "exp_avg_sq"), values, strict=True):
            state[f"{key}/{name}"] = value.detach().float().cpu().clone().contiguous()
    return state


def gathered_ema(engine: Engine) -> dict[str, torch.Tensor]:
    """Full EMA tensors, one parameter at a time."""
    return {n: gather_full(engine, [n], "ema")[n].cpu().clone() for n in engine.shapes}


def live(folder: str, zero_stage: int, dtype: str, removals: list[list[int]]) -> dict:
    """Train, write the state by public calls, resize (several times), go on for 20 steps."""
    config = tiny_config(zero_stage, dtype)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, config.run.seed)
    first, ema_kept = 0, True
    for kept in removals:
        train_steps(engine, config, first, 4)
        first += 4
        before, ema = public_state(engine), gathered_ema(engine)
        engine, _ = resize(engine, config, tuple(kept))
        after = gathered_ema(engine)
        ema_kept &= all(torch.equal(ema[n], after[n]) for n in after) and engine.ema_count == 0
    if comm.is_main():
        save_file(before, f"{folder}/before.safetensors")
    losses = train_steps(engine, config, first, STEPS_AFTER)
    state = public_state(engine)
    if comm.is_main():
        save_file(state, f"{folder}/live.safetensors")
    held = sum(p.numel for p in engine.pieces)
    positions = position_embedding(config.model.hidden_size, engine.ds.module.side).to(engine.dtype)
    same = torch.equal(engine.ds.module.pos_embed.cpu().to(engine.dtype), positions)
    return {"losses": losses, "steps": first, "ema_kept": ema_kept, "held": held, "positions": same}


def fresh(folder: str, zero_stage: int, dtype: str, kept_blocks: list[int], steps: int, mutations: list[str]) -> dict:
    """Another launch: build the pruned depth directly, set its state, train 20 steps; once per mutation."""
    config, losses = tiny_config(zero_stage, dtype), {}
    for mutation in mutations:
        engine = build_engine(config, replace(config.model, kept_blocks=tuple(kept_blocks)))
        fill(engine, load_file(f"{folder}/before.safetensors"), steps, mutation)
        losses[mutation] = train_steps(engine, config, steps, STEPS_AFTER)
        state = public_state(engine)
        if comm.is_main():
            save_file(state, f"{folder}/fresh_{mutation}.safetensors")
        destroy_engine(engine)
    return losses


def fill(engine: Engine, state: dict[str, torch.Tensor], steps: int, mutation: str) -> None:
    """Set weights and moments by DeepSpeed's public calls, with one deliberate mistake for a mutation."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    create_adam_state(engine.ds, engine.optimizer, 0 if mutation == "forgotten_step" else steps)
    first_kept = engine.kept_blocks[0]
    for name, p in engine.ds.module.named_parameters():
        source, keys = name, ["weight", "exp_avg", "exp_avg_sq"]
        if mutation == "swapped_moments" and name == f"blocks.{first_kept}.mlp.fc1.weight":
            keys = ["weight", "exp_avg_sq", "exp_avg"]
        if mutation == "shifted_block" and name.startswith(f"blocks.{first_kept}."):
            source = name.replace(f"blocks.{first_kept}.", f"blocks.{first_kept + 1}.")
        values = [state[f"{key}/{source}"] for key in keys]
        if isinstance(engine.ds.optimizer, torch.optim.Optimizer):
            p.data.copy_(values[0])
            engine.optimizer.state[p]["exp_avg"].copy_(values[1])
            engine.optimizer.state[p]["exp_avg_sq"].copy_(values[2])
        else:
            safe_set_full_fp32_param(p, values[0])
            safe_set_full_optimizer_state(p, values[1], "exp_avg")
            safe_set_full_optimizer_state(p, values[2], "exp_avg_sq")
    push_weights(engine.ds)


def refusals(zero_stage: int) -> dict:
    """What resize() says to impossible requests; the engine must still train afterwards."""
    config = tiny_config(zero_stage)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    messages = []
    for kept in ((), (0, 1, 2, 3), (0, 9)):
        try:
            resize(engine, config, kept)
        except ValueError as error:
            messages.append(str(error))
    different = (0, 1) if comm.is_main() else (0, 2)
    try:
        resize(engine, config, different)
    except comm.DistributedError as error:
        messages.append(str(error))
    return {"messages": messages, "losses": train_steps(engine, config, 0, 2)}


def options(zero_stage: int, dtype: str = "fp32", **model: bool) -> dict:
    """Losses before and after a resize with options of the blocks switched on; compiled graphs so far at both times."""
    from torch._dynamo.utils import counters

    config = tiny_config(zero_stage, dtype, **model)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, config.run.seed)
    losses = train_steps(engine, config, 0, 4)
    graphs = [counters["stats"]["unique_graphs"]]
    engine, _ = resize(engine, config, (0, 2, 3))
    losses += train_steps(engine, config, 4, 4)
    graphs.append(counters["stats"]["unique_graphs"])
    return {"losses": losses, "graphs": graphs, "names": list(engine.shapes)}
