"""Worker functions of test_soft_pruning.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ScoreConfig, SoftConfig
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.build import Engine, build_engine, destroy_engine
from entprune_ds.engine.gates import fold_gates, set_gates
from entprune_ds.engine.resize import resize
from entprune_ds.engine.state import KEYS, Piece, write_state
from entprune_ds.engine.train_step import train_step
from entprune_ds.engine.view import ShardedView, gather_full
from entprune_ds.models.dit import DiT
from entprune_ds.rng import generator_for
from entprune_ds.soft_pruning import open_soft, score_units, soft_update
from tests.tiny import tiny_config, tiny_draws


def random_state(piece: Piece) -> dict[str, Tensor]:
    """Weights, positive moments and an EMA of their own; a pure function of the name."""
    found = {}
    for key in KEYS:
        full = torch.randn(piece.shape, generator=generator_for(5, f"{key}/{piece.name}"))
        full = full * 1.5 / piece.shape[-1] ** 0.5 if key in ("weight", "ema") else full.abs() + 0.1
        found[key] = full.view(-1)[piece.start : piece.stop]
    return found


def random_gates(config: Config) -> dict[int, dict[str, Tensor]]:
    """Gates of every kind on blocks 0 and 2, of heads alone on block 3; block 2 has a head that is closed."""
    generator = generator_for(6, "gates")
    gates = {
        b: {"gate": torch.rand((), generator=generator), "attn.gate": 0.2 + torch.rand(2, generator=generator),
            "mlp.gate": 0.2 + torch.rand(128, generator=generator)}
        for b in (0, 2)
    }  # fmt: skip
    gates[2]["attn.gate"][1] = 0
    return gates | {3: {"attn.gate": torch.tensor([1.5, 0.5])}}


def outputs(engine: Engine, config: Config) -> dict[str, Tensor]:
    """What the raw and the EMA weights make of some draws. Collective."""
    draws = tiny_draws(config, 0, 0, 1)
    return {key: ShardedView(engine, key)(draws.z_t, draws.t, draws.labels) for key in ("weight", "ema")}


def trained_loss(engine: Engine, config: Config) -> float:
    """Loss of one step of the engine itself at learning rate 0, over all ranks. Collective."""
    engine.set_learning_rate(0.0)
    draws = tiny_draws(config, 1, engine.dp_rank, engine.dp_size)
    loss, _ = train_step(engine, [draws], FlowObjective().loss)
    return comm.all_reduce_sum(loss.detach().clone()).item() / comm.world_size()


def viewed_loss(engine: Engine, config: Config) -> float:
    """The same by the view. Collective."""
    draws = tiny_draws(config, 1, 0, 1)
    prediction = ShardedView(engine)(draws.z_t, draws.t, draws.labels)
    return FlowObjective().loss(prediction, draws.target, draws.t).mean().item()


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {f"{key}/{n}": gather_full(engine, [n], key)[n].clone() for n in engine.shapes for key in KEYS}


def by_hand(name: str, tensor: Tensor, gates: dict[int, dict[str, Tensor]]) -> Tensor:
    """A full state tensor after folding, written without the code under test."""
    key, _, rest = name.partition("/")
    power = {"weight": 1, "ema": 1, "exp_avg": -1, "exp_avg_sq": -2}[key]
    factor = torch.ones_like(tensor)
    for b, of_block in gates.items():
        for layer, units in (("attn.proj", "attn.gate"), ("mlp.fc2", "mlp.gate")):
            if rest.startswith(f"blocks.{b}.{layer}."):
                factor *= of_block.get("gate", torch.ones(()))
                values = of_block.get(units)
                if values is not None and rest.endswith("weight"):
                    factor *= values.repeat_interleave(tensor.shape[1] // len(values))
    if power < 0:
        factor[factor == 0] = 1
    return tensor * factor**power


def folds(topologies: list[tuple[int, str, int]]) -> list[dict[str, float]]:
    """For every (ZeRO stage, precision, pipeline stages): how far folding, the gates and scoring are from the truth."""
    found = []
    for zero_stage, dtype, stages in topologies:
        config = tiny_config(zero_stage, dtype)
        config = replace(config, parallel=replace(config.parallel, pipe_stages=stages))
        config = replace(config, score=ScoreConfig(gradient_batches=2, gradient_batch_size=8))
        engine = build_engine(config, config.model)
        write_state(engine.ds, engine.optimizer, engine.ema, 3, random_state)
        gates = random_gates(config)
        plain = outputs(engine, config)
        set_gates(engine, gates)
        gated, loss = outputs(engine, config), viewed_loss(engine, config)
        trained = trained_loss(engine, config)
        write_state(engine.ds, engine.optimizer, engine.ema, 3, random_state)
        before = state_of(engine)
        norm = score_units(engine, config, 0, 0, examples(config)).norm_squared
        scored = state_of(engine)
        fold_gates(engine)
        after, folded = state_of(engine), outputs(engine, config)
        expected = {n: by_hand(n, t, gates) for n, t in before.items()}
        found.append({
            "gating": min(_gap(gated[k], plain[k]) for k in gated),
            "folding": max(_gap(folded[k], gated[k]) for k in gated),
            "training": abs(trained - loss) / loss,
            "training_folded": abs(trained_loss(engine, config) - loss) / loss,
            "state": max(_gap(after[n], expected[n]) for n in before),
            "scoring": max(_gap(scored[n], before[n]) for n in before),
            "norm": norm, "gates_left": len(engine.gates),
        })  # fmt: skip
        destroy_engine(engine)
    return found


def examples(config: Config):  # type: ignore[no-untyped-def]
    """Synthetic calibration data, equal on all ranks."""
    m = config.model

    def next_examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        shape = (count, m.in_channels, m.input_size, m.input_size)
        return torch.randn(shape, generator=generator_for(8, purpose)), torch.arange(count) % m.num_classes

    return next_examples


def _gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def updated_and_resized() -> dict[str, float]:
    """The last update of a run that prunes blocks, carried out: how far its outputs are from what its gates gave."""
    config = tiny_config()
    soft = SoftConfig(every=1, end_step=1, removals=1, target_macs=0.5, eta=0.1, budget_weight=2.0)
    config = replace(config, soft=soft, score=ScoreConfig(gradient_batches=2, gradient_batch_size=8))
    engine = build_engine(config, config.model)
    write_state(engine.ds, engine.optimizer, engine.ema, 3, random_state)
    state = open_soft(config, engine, None)
    decision = soft_update(engine, config, state, 1, examples(config)).decision
    expected = {}
    for key in ("weight", "ema"):
        model = DiT(config.model.keeping(decision.kept_blocks))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(random_state(Piece(name, 0, p.numel(), tuple(p.shape), p, 0))[key].view_as(p))
        for b in decision.kept_blocks:
            model.blocks[str(b)].set_gates({"gate": state.mask[b]["gate"].float()})
        draws = tiny_draws(config, 0, 0, 1)
        expected[key] = model(draws.z_t, draws.t, draws.labels).detach()
    engine, _ = resize(engine, config, decision.kept_blocks, decision.cut, decision.narrow)
    found = outputs(engine, config)
    destroy_engine(engine)
    return {
        "gap": max(_gap(found[key], expected[key]) for key in found),
        "smallest": min(m["gate"].item() for m in state.mask.values()),
        "depth": len(decision.kept_blocks), "gates": len(state.mask),
    }  # fmt: skip
