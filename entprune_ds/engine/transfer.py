"""Moving named state between partitions: park it, send what another rank will hold, write it into a new engine.

No rank ever holds more than its old partition, its new partition and one parameter in flight: what stays is copied
key by key, and what arrives is written at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entprune_ds import comm
from entprune_ds.engine.build import Engine
from entprune_ds.engine.state import KEYS, Piece, create_adam_state, push_weights, state_tensor
from entprune_ds.pruning.surgery import Selection

Range = tuple[str, int, int]
BYTES_PER_ELEMENT = 4 * len(KEYS)


@dataclass(frozen=True)
class ParkedPiece:
    """Elements start..stop of one parameter outside any engine: one (numel,) f32 tensor for each of KEYS."""

    name: str
    start: int
    stop: int
    values: dict[str, Tensor]

    def cut(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the elements start..stop of the parameter."""
        return {key: value[start - self.start : stop - self.start] for key, value in self.values.items()}


def park(
    engine: Engine, names: Iterable[str], where: torch.device, narrow: Mapping[str, Selection]
) -> list[ParkedPiece]:
    """Take this rank's state of the named parameters out of an engine, which loses it. Local.

    One key after the other is copied and its old buffers are let go. The peak is a quarter above the old partition; at
    ZeRO-1/2 it is old partition and copies together: DeepSpeed holds views of the moments while the engine lives.

    Args:
        names: parameters that survive.
        where: device of the copies.
        narrow: what stays of those that get smaller.
    """
    wanted = set(names)
    kept = [p for p in engine.pieces if p.name in wanted]
    parked = [ParkedPiece(*part, {}) for part in narrowed_ranges([(p.name, p.start, p.stop) for p in kept], narrow)]
    flats = {id(p.flat): p.flat for p in engine.pieces}.values()
    for key in ("exp_avg", "exp_avg_sq", "ema", "weight"):
        for piece, target in zip(kept, parked, strict=True):
            old = state_tensor(piece, key, engine.optimizer, engine.ema)
            if piece.name in narrow:
                old = old[narrow[piece.name].mask(piece.start, piece.stop).to(old.device)]  # a copy
            target.values[key] = old.detach().to(where, copy=piece.name not in narrow)
            if key == "ema":
                del engine.ema[piece.name]
        for flat in flats:
            if key == "weight":
                flat.data = flat.data.new_empty(0)
            elif key != "ema":
                del engine.optimizer.state[flat][key]
    engine.ema.clear()
    return parked


@torch.no_grad()
def fill(engine: Engine, parked: list[ParkedPiece], have: list[list[Range]], step: int) -> int:
    """Write parked state into a fresh engine, whoever holds it. Collective.

    Args:
        parked: what this rank holds.
        have: per rank the (name, start, stop) list of what is parked there.
        step: Adam step count behind the moments.

    Returns:
        Bytes that this rank has sent.
    """
    create_adam_state(engine.ds, engine.optimizer, step)
    held, mine = {p.name: p for p in parked}, {p.name: p for p in engine.pieces}
    me, sent = comm.rank(), 0
    for source, target, name, start, stop in transfers(have, engine.layout):
        if source == target == me:
            _write(engine, mine[name], start, held[name].cut(start, stop))
        elif source == me:
            part = torch.stack([held[name].cut(start, stop)[key] for key in KEYS]).to(comm.device())
            dist.send(part, dst=target)
            sent += part.nbytes
            del part  # before the next one is made
        elif target == me:
            part = torch.empty(len(KEYS), stop - start, device=comm.device())
            dist.recv(part, src=source)
            _write(engine, mine[name], start, dict(zip(KEYS, part, strict=True)))
            del part
    push_weights(engine.ds)
    return sent


def _write(engine: Engine, piece: Piece, start: int, values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        place = state_tensor(piece, key, engine.optimizer, engine.ema)
        place[start - piece.start : start - piece.start + value.numel()].copy_(value)


def narrowed_ranges(ranges: Iterable[Range], narrow: Mapping[str, Selection]) -> list[Range]:
    """Where the elements of each range lie in its parameter once that is narrowed."""
    return [
        (n, narrow[n].before(start), narrow[n].before(stop)) if n in narrow else (n, start, stop)
        for n, start, stop in ranges
    ]


def missing_bytes(have: list[list[Range]], want: list[list[Range]]) -> int:
    """Bytes of state that ranks want and do not hold themselves: what any method has to send."""
    missing = 0
    for old, new in zip(have, want, strict=True):
        held = {name: (start, stop) for name, start, stop in old}
        for name, start, stop in new:
            low, high = held.get(name, (0, 0))
            missing += stop - start - max(0, min(stop, high) - max(start, low))
    return missing * BYTES_PER_ELEMENT


def transfers(have: list[list[Range]], want: list[list[Range]]) -> list[tuple[int, int, str, int, int]]:
    """(source, target, name, start, stop) of every wanted element, from the rank itself where it can; one order.

    Raises:
        ValueError: when no rank holds an element.
    """
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
                    plan.append((source, target, name, x, y))
                    left += [(low, x)] * (low < x) + [(y, high)] * (y < high)
                missing = left
            if missing:
                raise ValueError(f"no rank holds elements {missing} of `{name}`: the saved state is incomplete.")
    return sorted(plan, key=lambda p: (p[2], p[3], p[1], p[0]))
