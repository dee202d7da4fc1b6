"""Moving named state between partitions: park it in host memory, exchange what lies elsewhere, cut out pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entprune_ds import comm
from entprune_ds.engine.build import Engine
from entprune_ds.engine.state import KEYS, Piece, state_tensor

Range = tuple[str, int, int]


@dataclass(frozen=True)
class ParkedPiece:
    """Elements start..stop of one parameter in host memory: rows of `values` (4, numel) f32 follow KEYS."""

    name: str
    start: int
    stop: int
    values: Tensor


def park(engine: Engine, names: Iterable[str]) -> list[ParkedPiece]:
    """Copy this rank's state of the named parameters to host memory. Local."""
    wanted = set(names)
    parked = []
    for piece in engine.pieces:
        if piece.name in wanted:
            rows = [state_tensor(piece, key, engine.optimizer, engine.ema) for key in KEYS]
            parked.append(ParkedPiece(piece.name, piece.start, piece.stop, torch.stack([r.cpu() for r in rows])))
    return parked


def exchange(parked: list[ParkedPiece], have: list[list[Range]], want: list[list[Range]]) -> list[ParkedPiece]:
    """Send point to point what a rank wants and does not hold; everything else stays where it is. Collective.

    Args:
        parked: what this rank holds.
        have, want: per rank the (name, start, stop) lists, equal on all ranks.

    Returns:
        `parked` plus the received pieces.
    """
    me, held = comm.rank(), {p.name: p for p in parked}
    received = []
    for source, target, name, start, stop in _transfers(have, want):
        if me == source:
            piece = held[name]
            part = piece.values[:, start - piece.start : stop - piece.start].contiguous()
            dist.send(part.to(comm.device()), dst=target)
        elif me == target:
            part = torch.empty(len(KEYS), stop - start, device=comm.device())
            dist.recv(part, src=source)
            received.append(ParkedPiece(name, start, stop, part.cpu()))
    return parked + received


def _transfers(have: list[list[Range]], want: list[list[Range]]) -> list[tuple[int, int, str, int, int]]:
    """(source, target, name, start, stop) of every element that must travel, in one order for all ranks."""
    holders: dict[str, list[tuple[int, int, int]]] = {}
    for rank, ranges in enumerate(have):
        for name, start, stop in ranges:
            holders.setdefault(name, []).append((rank, start, stop))
    plan = []
    for target, ranges in enumerate(want):
        for name, start, stop in ranges:
            missing = [(start, stop)]
            mine_first = sorted(holders.get(name, []), key=lambda h: (h[0] != target, h[0]))
            for source, a, b in mine_first:
                left = []
                for low, high in missing:
                    x, y = max(low, a), min(high, b)
                    if x >= y:
                        left.append((low, high))
                        continue
                    if source != target:
                        plan.append((source, target, name, x, y))
                    left += [(low, x)] * (low < x) + [(y, high)] * (y < high)
                missing = left
            if missing:
                raise ValueError(f"no rank holds elements {missing} of `{name}`: the saved state is incomplete.")
    return sorted(plan, key=lambda p: (p[2], p[3], p[1], p[0]))


def reader(parked: list[ParkedPiece]) -> Callable[[Piece], dict[str, Tensor]]:
    """A `read` for state.write_state that cuts pieces out of parked ones."""
    by_name: dict[str, list[ParkedPiece]] = {}
    for piece in parked:
        by_name.setdefault(piece.name, []).append(piece)

    def read(piece: Piece) -> dict[str, Tensor]:
        out = torch.full((len(KEYS), piece.numel), float("nan"))
        covered = 0
        for source in by_name[piece.name]:
            low, high = max(piece.start, source.start), min(piece.stop, source.stop)
            if low < high:
                part = source.values[:, low - source.start : high - source.start]
                out[:, low - piece.start : high - piece.start] = part
                covered += high - low
        if covered < piece.numel:
            raise ValueError(f"only {covered} of {piece.numel} elements of `{piece.name}` are at hand.")
        return dict(zip(KEYS, out, strict=True))

    return read
