"""Named training state: for every parameter its fp32 weight, Adam moments and EMA, as this rank holds them.

DeepSpeed keeps this state in differently cut flat buffers at every ZeRO stage. Here each rank's part is a
list of `Piece`s, "elements start..stop of parameter NAME", which are views into those buffers. Resizing,
checkpoints, the EMA, scoring and exports all speak this one language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entprune_ds import comm

KEYS = ("weight", "exp_avg", "exp_avg_sq", "ema")
TESTED_DEEPSPEED = "0.19.8"
NEEDED = {  # private attributes per DeepSpeed optimizer that the functions below rely on
    "FP16_UnfusedOptimizer": ("fp16_groups", "fp32_groups"),
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state", "update_lp_params",
    ),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "_lazy_init_hp_params_optimizer_state", "update_lp_params"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat", "grad_position", "get_param_id", "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters", "_post_step", "persistent_parameters",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Elements start..stop (flattened) of one parameter, held by this rank."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    flat: Tensor
    """The tensor that the optimizer steps: the parameter itself or a flat partition."""
    offset: int
    """Where the elements begin in `flat`."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def view(self, tensor: Tensor) -> Tensor:
        """The elements of this piece in a tensor laid out like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def check_deepspeed(zero_optimizer: Any) -> None:
    """Refuse a DeepSpeed whose private layout differs from the one this file was written for.

    Raises:
        DistributedError: naming the missing attributes and the tested version; on all ranks, which run the same one.
    """
    kind = type(zero_optimizer).__name__
    missing = [name for name in NEEDED.get(kind, ()) if not _has(zero_optimizer, name)]
    if kind not in NEEDED or missing:
        import deepspeed

        found = f"has no {', '.join(missing)}" if missing else "is not a known ZeRO optimizer"
        raise comm.DistributedError(
            f"DeepSpeed {deepspeed.__version__}: {kind} {found}. Install deepspeed=={TESTED_DEEPSPEED}, "
            "the version that live resizing is tested with."
        )


def _has(owner: Any, name: str) -> bool:
    return name in vars(owner) or any(name in vars(c) for c in type(owner).__mro__)


def pieces_of(ds_engine: Any) -> list[Piece]:
    """This rank's pieces in parameter order. Local: no communication."""
    named = list(ds_engine.module.named_parameters())
    zero = ds_engine.optimizer
    if isinstance(zero, torch.optim.Optimizer):  # stage 0: the plain optimizer, everything on every rank
        return [Piece(n, 0, p.numel(), tuple(p.shape), p, 0) for n, p in named]
    check_deepspeed(zero)
    kind = type(zero).__name__
    if kind == "FP16_UnfusedOptimizer":  # stage 0 in 16 bit: an fp32 copy of every parameter on every rank
        copies = dict(_copies(zero))
        return [Piece(n, 0, p.numel(), tuple(p.shape), copies[p], 0) for n, p in named]
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return [piece for n, p in named if (piece := _stage3_piece(zero, n, p)) is not None]
    flats = (
        zero.fp32_groups_flat_partition
        if _has(zero, "fp32_groups_flat_partition")
        else zero.single_partition_of_fp32_groups
    )
    found = []
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is not None:
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            flat = flats[mapping.param_group_index]
            found.append(
                Piece(name, start, start + count, tuple(parameter.shape), flat, mapping.hp_fragment_address.start)
            )
    return found


def _copies(zero: Any) -> list[tuple[Tensor, Tensor]]:
    """(parameter, its fp32 copy) of DeepSpeed's 16-bit wrapper."""
    pairs = zip(zero.fp16_groups, zero.fp32_groups, strict=True)
    return [pair for half, full in pairs for pair in zip(half, full, strict=True)]


def _stage3_piece(zero: Any, name: str, parameter: Any) -> Piece | None:
    group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
    start = torch.distributed.get_rank(group=zero.dp_process_group) * count
    stop = min(start + count, parameter.ds_numel)  # the last partition is padded
    if start >= stop:
        return None
    return Piece(name, start, stop, tuple(parameter.ds_shape), zero.fp32_partitioned_groups_flat[group], offset)


def create_adam_state(ds_engine: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make zero moments, which a fresh engine lacks before its first step, and set the step count.

    Without it DeepSpeed's setters fail, and a resized engine would redo Adam's bias correction.
    """
    flats = {id(p.flat): p.flat for p in pieces_of(ds_engine)}
    for flat in flats.values():
        where = flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
        count = torch.tensor(float(step), dtype=torch.float32, device=where)
        optimizer.state[flat] = {
            "step": count if isinstance(optimizer, torch.optim.AdamW) else step,  # DeepSpeed's CPU Adam has an int
            "exp_avg": torch.zeros_like(flat, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(flat, memory_format=torch.preserve_format).detach(),
        }
    zero = ds_engine.optimizer
    if type(zero).__name__ in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        zero._lazy_init_hp_params_optimizer_state()


def adam_step(pieces: list[Piece], optimizer: torch.optim.Optimizer) -> int:
    """Number of Adam steps behind the moments."""
    return int(float(optimizer.state[pieces[0].flat]["step"])) if pieces else 0


def state_tensor(piece: Piece, key: str, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> Tensor:
    """View of one state tensor of a piece: key is weight, exp_avg, exp_avg_sq or ema; shape (numel,) f32."""
    if key == "weight":
        return piece.view(piece.flat)
    if key == "ema":
        return ema[piece.name]
    return piece.view(optimizer.state[piece.flat][key])


def write_state(
    ds_engine: Any, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor], step: int,
    read: Callable[[Piece], dict[str, Tensor]],
) -> None:  # fmt: skip
    """Fill a fresh engine: every piece takes what `read(piece)` returns for each of KEYS. Collective.

    Args:
        step: Adam step count behind the moments.
        read: returns {key: (numel,) f32} for the elements of the piece.
    """
    create_adam_state(ds_engine, optimizer, step)
    for piece in pieces_of(ds_engine):
        values = read(piece)
        for key in KEYS:
            state_tensor(piece, key, optimizer, ema).copy_(values[key])
    push_weights(ds_engine)


def push_weights(ds_engine: Any) -> None:
    """Copy the fp32 weights into the tensors that the forward pass uses. Collective."""
    zero = ds_engine.optimizer
    if isinstance(zero, torch.optim.Optimizer):
        return
    if type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())
    elif type(zero).__name__ == "FP16_UnfusedOptimizer":
        for parameter, copy in _copies(zero):
            parameter.data.copy_(copy)
    else:
        zero.update_lp_params()
