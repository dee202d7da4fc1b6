"""Worker functions of test_resize.py: run on every rank by tests.ranks."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from entprune_ds import comm
from entprune_ds.diffusion.objective import loss_per_example
from entprune_ds.engine.build import Engine, build_engine, initialize_fresh, train_step
from entprune_ds.engine.resize import resize
from tests.tiny import tiny_config, tiny_draws


def steps(engine: Engine, config, first: int, count: int) -> list[float]:
    """Train some steps; returns this rank's losses, exactly."""
    losses = []
    for step in range(first, first + count):
        draws = tiny_draws(config, step, comm.rank(), comm.world_size())
        loss, _ = train_step(engine, [draws], loss_per_example)
        engine.update_ema(config.train.ema_decay)
        losses.append(loss.item().hex())
    return losses


def public_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and moments through DeepSpeed's public calls, or the plain optimizer at stage 0; not our code."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, p in engine.ds.module.named_parameters():
        if isinstance(engine.ds.optimizer, torch.optim.Optimizer):
            values = p.detach(), engine.optimizer.state[p]["exp_avg"], engine.optimizer.state[p]["exp_avg_sq"]
        else:
            moments = [safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")]
            values = (safe_get_full_fp32_param(p), *moments)
        for key, value in zip(("weight", "exp_avg", "exp_avg_sq"), values, strict=True):
            state[f"{key}/{name}"] = value.detach().cpu().clone().contiguous()
    return state


def live(folder: str, zero_stage: int, kept_blocks: list[list[int]], dtype: str = "fp32") -> dict:
    """Train, write the state by public calls, resize (once or twice), go on 20 steps."""
    config = tiny_config(zero_stage, dtype)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, config.run.seed)
    losses, first = [], 0
    for kept in kept_blocks:
        steps(engine, config, first, 4)
        first += 4
        before = public_state(engine)
        if comm.is_main():
            save_file(before, f"{folder}/before_{zero_stage}.safetensors")
        engine, _ = resize(engine, config, tuple(kept))
    losses = steps(engine, config, first, 20)
    after = public_state(engine)
    if comm.is_main():
        save_file(after, f"{folder}/live_{zero_stage}.safetensors")
    return {"losses": losses, "first": first, "names": list(engine.shapes)}


def fresh(
    folder: str, zero_stage: int, kept_blocks: list[int], first: int, dtype: str = "fp32", mutate: str = ""
) -> dict:
    """Another launch: build the pruned depth directly, set the state by public calls only, train 20 steps."""
    from dataclasses import replace

    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    from entprune_ds.engine.state import create_adam_state, push_weights

    config = tiny_config(zero_stage, dtype)
    engine = build_engine(config, replace(config.model, kept_blocks=tuple(kept_blocks)))
    state = load_file(f"{folder}/before_{zero_stage}.safetensors")
    create_adam_state(engine.ds, engine.optimizer, 0 if mutate == "step" else first)
    for name, p in engine.ds.module.named_parameters():
        source, keys = name, ["weight", "exp_avg", "exp_avg_sq"]
        if mutate == "moments" and name == "blocks.0.attn.qkv.weight":
            keys = ["weight", "exp_avg_sq", "exp_avg"]
        if mutate == "block" and name.startswith("blocks.0."):
            source = name.replace("blocks.0.", "blocks.1.")
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
    losses = steps(engine, config, first, 20)
    after = public_state(engine)
    if comm.is_main():
        save_file(after, f"{folder}/fresh_{zero_stage}.safetensors")
    return {"losses": losses}
