"""Worker functions of test_resize.py: run on every rank by tests.ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.resize import resize
from entprune_ds.engine.state import KEYS, create_adam_state, push_weights
from entprune_ds.engine.train_step import train_step
from entprune_ds.engine.view import gather_full
from entprune_ds.models.dit import DiT, initialize
from entprune_ds.models.layers import position_embedding
from tests.tiny import tiny_config, tiny_draws

STEPS_BEFORE, STEPS_AFTER = 4, 20
OTHER = {"lr": 7e-4, "weight_decay": 0.1}
"""Settings that the optimizer gets before every resize, unlike the config's."""


def train_steps(engine: Engine, config: Config, first: int, count: int) -> list[str]:
    """Train some steps; returns this rank's losses as exact hexadecimal text."""
    losses = []
    for step in range(first, first + count):
        draws = tiny_draws(config, step, comm.rank(), comm.world_size())
        loss, _ = train_step(engine, [draws], FlowObjective().loss)
        engine.update_ema(config.train.ema_decay)
        losses.append(loss.item().hex())
    return losses


def gathered_ema(engine: Engine) -> dict[str, torch.Tensor]:
    """Full EMA tensors, one parameter at a time. Collective."""
    return {n: gather_full(engine, [n], "ema")[n].cpu().clone() for n in engine.shapes}


def public_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and moments through DeepSpeed's public calls (at stage 0, which has none, its optimizer) and the EMA."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state, ema = {}, gathered_ema(engine)  # on a pipeline the other stages' tensors too: all ranks call alike
    for (name, p), plain in zip(engine.ds.module.named_parameters(), stage0_weights(engine), strict=True):
        if plain is not None:
            values = [
                plain.detach(),
                engine.optimizer.state[plain]["exp_avg"],
                engine.optimizer.state[plain]["exp_avg_sq"],
            ]
        else:
            moments = [safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")]
            values = [safe_get_full_fp32_param(p), *moments]
        for key, value in zip(KEYS, values, strict=False):
            state[f"{key}/{name}"] = value.detach().float().cpu().clone().contiguous()
        state[f"ema/{name}"] = ema[name]
    return state


def stage0_weights(engine: Engine) -> list:
    """What the optimizer of stage 0 steps, in the order of the parameters; None for each where it steps flat parts."""
    flat = type(engine.ds.optimizer).__name__ == "BF16_Optimizer"  # of pipelines, at stage 0 too
    if flat or int(engine.ds.zero_optimization_stage()) > 0:
        return [None for _ in engine.ds.module.parameters()]
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def change_settings(optimizer: torch.optim.Optimizer) -> None:
    """Train with OTHER from here on."""
    for group in optimizer.param_groups:
        group.update(OTHER)


def settings(engine: Engine) -> list[dict]:
    """All that the groups of the optimizer hold beside the parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]


def live(folder: str, zero_stage: int, dtype: str, scenarios: dict[str, list[list[int]]]) -> dict:
    """Per scenario: train, write the state by public calls, resize (several times), go on for 20 steps."""
    return {name: live_once(f"{folder}/{name}", zero_stage, dtype, removals) for name, removals in scenarios.items()}


def live_once(path: str, zero_stage: int, dtype: str, removals: list[list[int]]) -> dict:
    config = tiny_config(zero_stage, dtype)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, config.run.seed)
    losses, traffic, settings_kept = [], [], True
    for kept in removals:
        losses += train_steps(engine, config, len(losses), STEPS_BEFORE)
        change_settings(engine.optimizer)
        before, set_before = public_state(engine), settings(engine)
        engine, report = resize(engine, config, tuple(kept))
        traffic.append([report.bytes_state, report.bytes_minimum])
        settings_kept &= settings(engine) == set_before
    if comm.is_main():
        save_file(before, f"{path}_before.safetensors")
    after = train_steps(engine, config, len(losses), STEPS_AFTER)
    state = public_state(engine)
    if comm.is_main():
        save_file(state, f"{path}_live.safetensors")
    held = sum(p.numel for p in engine.pieces)
    positions = position_embedding(config.model.hidden_size, engine.ds.module.side).to(engine.dtype)
    same = torch.equal(engine.ds.module.pos_embed.cpu().to(engine.dtype), positions)
    destroy_engine(engine)
    found = {"before": losses, "after": after, "held": held, "positions": same, "traffic": traffic}
    return found | {"settings_kept": settings_kept}


def fresh(
    folder: str, zero_stage: int, dtype: str, scenarios: dict[str, list[list[int]]], mutations: list[str]
) -> dict:
    """Another launch: build the pruned depth directly, set its state, train 20 steps; the first one mutated too."""
    config, losses = tiny_config(zero_stage, dtype), {}
    runs = [(name, "none") for name in scenarios] + [(next(iter(scenarios)), m) for m in mutations]
    for name, mutation in runs:
        steps, kept = STEPS_BEFORE * len(scenarios[name]), tuple(scenarios[name][-1])
        engine = build_engine(config, replace(config.model, kept_blocks=kept))
        change_settings(engine.optimizer)
        fill(engine, load_file(f"{folder}/{name}_before.safetensors"), steps, mutation)
        losses[f"{name}_{mutation}"] = train_steps(engine, config, steps, STEPS_AFTER)
        state = public_state(engine)
        if comm.is_main():
            save_file(state, f"{folder}/{name}_{mutation}.safetensors")
        destroy_engine(engine)
    return losses


def fill(engine: Engine, state: dict[str, torch.Tensor], steps: int, mutation: str) -> None:
    """Set weights and moments by DeepSpeed's public calls, and the EMA; with one deliberate mistake for a mutation."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    create_adam_state(engine.ds, engine.optimizer, 0 if mutation == "forgotten_step" else steps)
    first_kept = engine.kept_blocks[0]
    for (name, p), plain in zip(engine.ds.module.named_parameters(), stage0_weights(engine), strict=True):
        source, keys = name, KEYS[:3]
        if mutation == "swapped_moments" and name == f"blocks.{first_kept}.mlp.fc1.weight":
            keys = ("weight", "exp_avg_sq", "exp_avg")
        if mutation == "shifted_block" and name.startswith(f"blocks.{first_kept}."):
            source = name.replace(f"blocks.{first_kept}.", f"blocks.{first_kept + 1}.")
        values = [state[f"{key}/{source}"] for key in keys]
        if plain is not None:
            plain.data.copy_(values[0])
            engine.optimizer.state[plain]["exp_avg"].copy_(values[1])
            engine.optimizer.state[plain]["exp_avg_sq"].copy_(values[2])
        else:
            safe_set_full_fp32_param(p, values[0])
            safe_set_full_optimizer_state(p, values[1], "exp_avg")
            safe_set_full_optimizer_state(p, values[2], "exp_avg_sq")
    ema = "weight" if mutation == "stale_ema" else "ema"
    for piece in engine.pieces:
        engine.ema[piece.name].copy_(state[f"{ema}/{piece.name}"].view(-1)[piece.start : piece.stop])
    push_weights(engine.ds)


def reference(folder: str, scenarios: dict[str, list[list[int]]], grad_clip: float | None = None) -> dict:
    """One process, no DeepSpeed: DiT, torch AdamW, clipping and EMA, removing the same blocks at the same steps."""
    losses, config = {}, tiny_config(0)
    train = config.train if grad_clip is None else replace(config.train, grad_clip=grad_clip)
    for scenario, removals in scenarios.items():
        model = initialize(DiT(config.model), config.run.seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        ema = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses[scenario], count = [], 0
        for step in range(STEPS_BEFORE * len(removals) + STEPS_AFTER):
            if step and step % STEPS_BEFORE == 0 and step // STEPS_BEFORE <= len(removals):
                for block in set(model.blocks) - {str(b) for b in removals[step // STEPS_BEFORE - 1]}:
                    del model.blocks[block]
                left = list(model.parameters())
                optimizer.param_groups[0]["params"], count = left, 0
                change_settings(optimizer)
            draws = tiny_draws(config, step, 0, 1)
            loss = FlowObjective().loss(model(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            decay, count = min(train.ema_decay, (1 + count) / (10 + count)), count + 1
            for name, p in model.named_parameters():
                ema[name] += (1 - decay) * (p.detach() - ema[name])
            losses[scenario].append(loss.item())
        state = {f"weight/{n}": p.detach().clone() for n, p in model.named_parameters()}
        state |= {f"ema/{n}": ema[n] for n, _ in model.named_parameters()}
        save_file(state, f"{folder}/{scenario}.safetensors")
    return losses


def refused(engine: Engine, config: Config, kept: tuple[int, ...], cut: tuple[int, ...] | None = None) -> str:
    """What resize() says to an impossible request, which must leave the state as it is, to the bit."""
    before = public_state(engine)
    try:
        resize(engine, config, kept, cut)
    except (ValueError, RuntimeError) as error:
        after = public_state(engine)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before), error
        return str(error)
    raise AssertionError(f"a resize to blocks {kept} with the cut {cut} was not refused")


def refusals(zero_stage: int) -> dict:
    """What resize() says to impossible requests, and whether a training that makes them ends like one that does not."""
    config, messages, states = tiny_config(zero_stage), [], []
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    for asks in (False, True):
        engine = build_engine(config, config.model)
        initialize_fresh(engine, 0)
        first, second = (tiny_draws(config, step, comm.rank(), comm.world_size()).split(2) for step in (0, 1))
        train_step(engine, first, FlowObjective().loss)
        if asks:
            different = (0, 1) if comm.is_main() else (0, 2)
            messages += [refused(engine, config, kept) for kept in ((), (0, 1, 2, 3), (0, 9))]
            messages += [refused(engine, config, (0, 1), cut=(1, 1)), refused(engine, config, different)]
        for number, draws in enumerate(second):
            loss = FlowObjective().loss(engine.ds(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean()
            engine.ds.backward(loss)
            engine.ds.step()
            if asks and number == 0:  # in the middle of an accumulation
                messages.append(refused(engine, config, (0, 1)))
        steps = [engine.adam_step]
        engine, _ = resize(engine, config, (0, 1))
        states.append(public_state(engine))
        steps, depth = [*steps, engine.adam_step], engine.depth
        destroy_engine(engine)
    undisturbed, asked = states
    same = undisturbed.keys() == asked.keys() and all(torch.equal(undisturbed[n], asked[n]) for n in asked)
    return {"messages": messages, "steps": steps, "depth": depth, "same": same}


def grown() -> list[list[int]]:
    """Micro-batch and accumulation steps of a live engine at 16, 2 and 1 blocks, with prune.regrow_micro_batch."""
    config = tiny_config(depth=16)
    train, prune = replace(config.train, micro_batch_size=1), replace(config.prune, regrow_micro_batch=True)
    config = replace(config, train=train, prune=prune)
    engine, plans = build_engine(config, config.model), []
    initialize_fresh(engine, 0)
    for kept in (tuple(range(16)), (1, 2), (2,)):
        if kept != engine.kept_blocks:
            engine, _ = resize(engine, config, kept)
        plans.append([engine.ds.train_micro_batch_size_per_gpu(), engine.ds.gradient_accumulation_steps()])
        draws = tiny_draws(config, len(plans), comm.rank(), comm.world_size())
        train_step(engine, draws.split(plans[-1][0]), FlowObjective().loss)
        assert engine.adam_step == len(plans)  # all of the batch is one step
    return plans


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
