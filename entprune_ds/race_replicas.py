"""Trials on single ranks: each trains whole candidates of its own with plain torch, all ranks at once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.diffusion.objective import Draws
from entprune_ds.engine.build import Engine, build_optimizer
from entprune_ds.engine.ds_config import WORKING_BLOCKS
from entprune_ds.engine.view import gather_full
from entprune_ds.estimate import example_activations
from entprune_ds.models.dit import DiT
from entprune_ds.models.layers import position_embedding
from entprune_ds.models.registry import count_parameters, parameter_shapes
from entprune_ds.pruning.halving import KeepSet
from entprune_ds.race_plan import trial_batch
from entprune_ds.race_trial import Recovery, micro_batch
from entprune_ds.validation import BATCH

KEYS = ("weight", "exp_avg", "exp_avg_sq")
"""What a trial starts from; the EMA follows the winner only."""
FREE_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Part of the memory that is free now which trials may take."""


@dataclass(frozen=True)
class State:
    """Training state of a model or of a part of it, whole tensors in host memory."""

    tensors: dict[str, dict[str, Tensor]]
    """{key of KEYS: {parameter name: f32}}."""
    step: int
    """Adam steps behind the moments."""


def gathered_state(engine: Engine) -> State:
    """The whole model's state on every rank, gathered one block and key at a time. Collective."""
    groups: dict[str, list[str]] = {}
    for name in engine.shapes:
        groups.setdefault(".".join(name.split(".")[:2]) if name.startswith("blocks.") else "", []).append(name)
    tensors: dict[str, dict[str, Tensor]] = {key: {} for key in KEYS}
    for names in groups.values():
        for key in KEYS:
            tensors[key] |= {n: t.cpu() for n, t in gather_full(engine, names, key).items()}
    return State(tensors, engine.adam_step)


def fits(engine: Engine, config: Config, candidates: int) -> bool:
    """Whether every rank has room for whole candidates beside its part of the run. Collective.

    A rank needs 16 bytes a parameter of a candidate (fp32 weights, gradients, two moments) and its activations on the
    device; in host memory 12 bytes a parameter of the model and of each candidate that it will go on with.
    """
    model, depth = engine.model_config, config.prune.target_depth or 1
    small = count_parameters(replace(model, kept_blocks=engine.kept_blocks[:depth], block_widths=()))
    block, ends = example_activations(replace(model, weights="", kept_blocks=None, depth=1), torch.float32)
    micro = micro_batch(engine.ds.train_micro_batch_size_per_gpu(), trial_batch(config))
    device = 16 * small + micro * ((depth + WORKING_BLOCKS) * block + ends)
    host = 12 * (count_parameters(model) + -(-candidates // comm.world_size()) * small)
    beside = comm.all_gather_json(socket.gethostname()).count(socket.gethostname())
    if comm.device().type == "cuda":
        room = device <= FREE_SHARE["cuda"] * torch.cuda.mem_get_info()[0]
    else:
        room, host = True, host + device
    return all(comm.all_gather_json(room and host <= FREE_SHARE["cpu"] * free_host_memory() / beside))


def free_host_memory() -> int:
    """Bytes that processes of this machine may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


class Replicas:
    """Trials of whole candidates, candidate i on rank i mod world size; the run's engine stays as it is."""

    def __init__(self, model: ModelConfig, start: State, recovery: Recovery, micro: int, dtype: torch.dtype,
                 settings: dict[str, Any] | None = None):  # fmt: skip
        """
        Args:
            model: architecture now, all present blocks.
            start: its state.
            recovery: what all trials share.
            micro: most examples of one forward pass.
            dtype: precision of the forward pass in training; weights, moments and validation are f32.
            settings: of the optimizer's groups; None takes those of train.*.
        """
        self.model, self.start, self.recovery, self.dtype, self.settings = model, start, recovery, dtype, settings or {}
        self.micro = micro
        self.going_on: dict[KeepSet, State] = {}
        self.owner: dict[KeepSet, int] = {}
        """Rank that holds the state which a candidate goes on with."""

    def run(self, keep_sets: list[KeepSet], start: int, stop: int, watch: Callable[[float], None]) -> list[float]:
        """pruning.halving.Trial; `watch` learns which share of the round is done. Collective."""
        size, found = comm.world_size(), {}
        if start == 0:
            self.owner = {}
        self._hand_over(keep_sets, self.start.step + start)
        waves = -(-len(keep_sets) // size)
        for wave in range(waves):
            place = wave * size + comm.rank()
            mine = keep_sets[place] if place < len(keep_sets) else None
            for done in self._steps(mine, start, stop):
                watch((wave + done) / waves)
                comm.barrier()  # ranks without a candidate wait here step by step, not in one long collective
            if mine is not None:
                found[place] = self.loss
        losses = {int(i): loss for part in comm.all_gather_json(found) for i, loss in part.items()}
        return [losses[i] for i in range(len(keep_sets))]

    def _steps(self, kept: KeepSet | None, start: int, stop: int) -> Iterator[float]:
        """Train and judge one candidate (None: only keep pace); yields the share that is done after every step."""
        if kept is None:
            yield from ((i + 1) / (stop - start) for i in range(stop - start))
            return
        state = self.going_on[kept] if start else self.start
        model, optimizer = built(self.model.keeping(kept), state, self.recovery.config)
        for group in optimizer.param_groups:
            group.update(self.settings)
        for i, draws in enumerate(self.recovery.draws(start, stop), start):
            for group in optimizer.param_groups:
                group["lr"] = self.recovery.learning_rate(i)
            self.step(model, optimizer, draws)
            yield (i + 1 - start) / (stop - start)
        self.loss = mean_loss(model, self.recovery)
        self.going_on[kept] = state_of(model, optimizer)

    def step(self, model: DiT, optimizer: torch.optim.Optimizer, draws: Draws) -> None:
        """One optimizer step on the draws of a whole trial batch."""
        clip, count = self.recovery.config.train.grad_clip, len(draws.t)
        for part in draws.split(self.micro):
            part = part.to(comm.device(), torch.float32)
            with torch.autocast(comm.device().type, self.dtype, enabled=self.dtype != torch.float32):
                prediction = model(part.z_t, part.t, part.labels)
            loss = self.recovery.objective.loss(prediction, part.target, part.t).sum() / count
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    def _hand_over(self, keep_sets: list[KeepSet], adam_step: int) -> None:
        """Forget who has left, and send states to the ranks that go on with them. Collective."""
        me, before = comm.rank(), self.owner
        self.owner = {kept: i % comm.world_size() for i, kept in enumerate(keep_sets)}
        for kept, target in self.owner.items():
            source = before.get(kept, target)
            if source == target or me not in (source, target):
                continue
            if me == source:
                for tensor in _flat(self.going_on[kept]):
                    dist.send(tensor.to(comm.device()), dst=target)
            else:
                self.going_on[kept] = self._received(kept, source, adam_step)
        self.going_on = {kept: state for kept, state in self.going_on.items() if self.owner.get(kept) == me}

    def _received(self, kept: KeepSet, source: int, adam_step: int) -> State:
        shapes = parameter_shapes(self.model.keeping(kept))
        state = State({key: {n: torch.empty(s) for n, s in shapes.items()} for key in KEYS}, adam_step)
        for tensor in _flat(state):
            arrived = torch.empty(tensor.shape, device=comm.device())
            dist.recv(arrived, src=source)
            tensor.copy_(arrived)
        return state


def built(model: ModelConfig, state: State, config: Config) -> tuple[DiT, torch.optim.Optimizer]:
    """A candidate of its own, with the optimizer that goes on from the state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        candidate = DiT(replace(model, compile=False))
    names = dict(candidate.named_parameters())
    weights = {n: state.tensors["weight"][n].to(comm.device(), copy=True) for n in names}
    candidate.load_state_dict(weights, strict=True, assign=True)
    candidate.pos_embed = position_embedding(model.hidden_size, candidate.side).to(comm.device())
    candidate.requires_grad_(True).train()
    optimizer = build_optimizer(candidate, config.train, offload=False)
    for name, parameter in candidate.named_parameters():
        where = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        moments = {key: state.tensors[key][name].to(comm.device(), copy=True) for key in KEYS[1:]}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.step), device=where), **moments}
    return candidate, optimizer


def state_of(model: DiT, optimizer: torch.optim.Optimizer) -> State:
    """The state that a candidate has reached, in host memory."""
    named = dict(model.named_parameters())
    tensors = {"weight": {n: p.detach().cpu() for n, p in named.items()}}
    tensors |= {key: {n: optimizer.state[p][key].cpu() for n, p in named.items()} for key in KEYS[1:]}
    return State(tensors, int(next(iter(optimizer.state.values()))["step"]))


@torch.no_grad()
def mean_loss(model: DiT, recovery: Recovery) -> float:
    """Loss of a candidate on the draws that judge."""
    total = 0.0
    for part in recovery.validation.split(BATCH):
        part = part.to(comm.device(), torch.float32)
        loss = recovery.objective.loss(model(part.z_t, part.t, part.labels), part.target, part.t)
        total += loss.double().sum().item()
    return total / len(recovery.validation.t)


def _flat(state: State) -> Sequence[Tensor]:
    return [state.tensors[key][name] for key in KEYS for name in sorted(state.tensors[key])]
