"""The continuous mask of soft pruning: it follows the gradient flow of an energy while a budget shrinks.

    E(m) = sum_i c_kind(i) m_i z_i + lambda (M(m) - C)^2,    m <- clip(m - eta / c_kind dE/dm, 0, 1)

z_i is the score S_i of unit i (gradient-flow pruning, arXiv 2501.09464; the formulas are ours, for exact ones are not
public), standardised over all units of its kind; c_kind the mean cost of a unit of that kind, so that a block weighs
more than an MLP channel; M(m) the multiply-accumulates under the mask, as a share of those at the start; C the budget.
The energy falls fastest by closing what has a HIGH score: the unit whose removal makes the gradient grow goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entprune_ds.pruning.folding import Gates
from entprune_ds.pruning.surgery import Narrowing

EXACT = 1e-9
"""Relative rounding of sums of shares."""
KINDS = {"block": "gate", "head": "attn.gate", "channel": "mlp.gate"}
"""Units of the settings, and the gates that carry them."""
Mask = dict[int, dict[str, Tensor]]
"""{original block index: {gate: values in [0, 1], float64}}, for the kinds that are pruned."""


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of the units of a block, as shares of all blocks at the start; see macs.BlockMacs."""

    head: float
    channel: float
    rest: float
    widths: Mapping[int, tuple[int, int]]
    """Present heads and channels of every present block."""


@dataclass
class SoftState:
    """What a resume needs to go on exactly."""

    mask: Mask
    folded: Mask
    """The part of the mask that is in the weights already: the gate of the model is mask / folded."""
    step: int = -1
    """Step of the last update."""
    updates: int = 0
    """Updates so far."""

    def gates(self) -> Gates:
        """The gates of the model."""
        return both(self.mask, self.folded, torch.div)

    def fold(self) -> None:
        """The gates are in the weights from now on."""
        self.folded = {b: {kind: m.clone() for kind, m in of_block.items()} for b, of_block in self.mask.items()}

    def shrink(self, kept_blocks: Iterable[int], narrow: Mapping[int, Narrowing]) -> None:
        """Forget what is removed."""
        self.mask, self.folded = (
            {b: _shrunk(values[b], narrow.get(b, Narrowing())) for b in kept_blocks}
            for values in (self.mask, self.folded)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values of a checkpoint's record."""
        lists = {
            name: {str(b): {kind: m.tolist() for kind, m in of_block.items()} for b, of_block in values.items()}
            for name, values in (("mask", self.mask), ("folded", self.folded))
        }
        return {"step": self.step, "updates": self.updates, **lists}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SoftState:
        """What `to_json` wrote."""
        mask, folded = (
            {
                int(b): {kind: torch.tensor(m, dtype=torch.float64) for kind, m in of_block.items()}
                for b, of_block in values[name].items()
            }
            for name in ("mask", "folded")
        )
        return cls(mask, folded, values["step"], values["updates"])


def open_mask(widths: Mapping[int, tuple[int, int]], units: Iterable[str], protected: Iterable[int] = ()) -> SoftState:
    """Everything open: a mask of ones over the chosen kinds of units of blocks of these widths.

    A protected block has no gate of its own, so that it stays; its heads and channels may go.
    """
    shapes = {
        b: {"gate": (), "attn.gate": (heads,), "mlp.gate": (channels,)} for b, (heads, channels) in widths.items()
    }
    kinds = [KINDS[unit] for unit in KINDS if unit in units]
    whole = set(protected)
    mask = {
        b: {k: torch.ones(of_block[k], dtype=torch.float64) for k in kinds if k != "gate" or b not in whole}
        for b, of_block in shapes.items()
    }
    state = SoftState(mask, {})
    state.fold()
    return state


def both(a: Mask, b: Mask, operation: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    """`operation` on the values that a and b have in common places."""
    return {
        block: {kind: operation(m, b[block][kind]) for kind, m in of_block.items()} for block, of_block in a.items()
    }


def standardised(scores: Mask) -> Mask:
    """(S - mean) / standard deviation over all units of a kind; 0 where all are equal."""
    found: Mask = {block: {} for block in scores}
    for kind in {kind: None for of_block in scores.values() for kind in of_block}:
        having = {block: of_block for block, of_block in scores.items() if kind in of_block}
        every = torch.cat([of_block[kind].reshape(-1) for of_block in having.values()])
        mean, spread = every.mean(), every.std(correction=0)
        for block, of_block in having.items():
            centered = of_block[kind] - mean
            found[block][kind] = centered / spread if spread > 0 else torch.zeros_like(centered)
    return found


def masked_macs(mask: Mask, costs: Costs) -> Tensor:
    """M(m): sum over blocks of m_block (rest + sum of the heads' and channels' m times their cost)."""
    total = torch.zeros((), dtype=torch.float64)
    for block, (heads, channels) in costs.widths.items():
        gates = mask[block]
        inner = costs.rest + costs.head * gates.get("attn.gate", torch.ones(heads, dtype=torch.float64)).sum()
        inner = inner + costs.channel * gates.get("mlp.gate", torch.ones(channels, dtype=torch.float64)).sum()
        total = total + gates.get("gate", 1.0) * inner
    return total


def mean_cost(kind: str, costs: Costs) -> float:
    """Mean multiply-accumulates of a unit of this kind."""
    if kind == "gate":
        whole = [costs.rest + costs.head * h + costs.channel * c for h, c in costs.widths.values()]
        return sum(whole) / len(whole)
    return costs.head if kind == "attn.gate" else costs.channel


def energy(mask: Mask, scores: Mask, costs: Costs, budget: float, weight: float) -> Tensor:
    """E(m).

    Args:
        scores: standardised.
        budget: C.
        weight: lambda.
    """
    drive = sum(
        (
            mean_cost(kind, costs) * (m * scores[block][kind]).sum()
            for block, g in mask.items()
            for kind, m in g.items()
        ),
        torch.zeros((), dtype=torch.float64),
    )
    return drive + weight * (masked_macs(mask, costs) - budget) ** 2


def updated(mask: Mask, scores: Mask, costs: Costs, budget: float, weight: float, eta: float) -> Mask:
    """One step down the energy; see `energy`."""
    leaves = {b: {kind: m.clone().requires_grad_() for kind, m in g.items()} for b, g in mask.items()}
    flat = [m for g in leaves.values() for m in g.values()]
    with torch.enable_grad():
        slopes = iter(torch.autograd.grad(energy(leaves, scores, costs, budget, weight), flat))
    return {
        b: {kind: (m - eta / mean_cost(kind, costs) * next(slopes)).clamp(0, 1) for kind, m in g.items()}
        for b, g in mask.items()
    }


class Unit(NamedTuple):
    """A block, head or channel that can go."""

    mask: float
    score: float
    """Standardised."""
    block: int
    kind: str
    """Its gate."""
    number: int


@dataclass(frozen=True)
class Removal:
    """What goes for good."""

    kept_blocks: tuple[int, ...]
    narrow: dict[int, Narrowing]
    macs: float
    """Share of the multiply-accumulates that remains."""


def choose(mask: Mask, scores: Mask, costs: Costs, target: float, threshold: float, final: bool) -> Removal:
    """The units that go: those below the threshold, weakest first; at the last removal more, until the target.

    Nothing goes once that is reached. Of the others at the last removal, weakest first, one that would fall below the
    target is left to the end, where the cheapest that does goes. A block keeps its strongest head and channel, the
    model its strongest block. Among equal masks the higher score goes first, then the higher index.
    """
    stays = {b: {kind: [True] * m.numel() for kind, m in g.items()} for b, g in mask.items()}
    left = {b: costs.rest + costs.head * h + costs.channel * c for b, (h, c) in costs.widths.items()}

    def price(unit: Unit) -> float:
        return left[unit.block] if unit.kind == "gate" else costs.head if unit.kind == "attn.gate" else costs.channel

    def may_go(unit: Unit) -> bool:
        if sum(left.values()) <= target * (1 + EXACT) or unit.block not in left:
            return False
        return len(left) > 1 if unit.kind == "gate" else sum(stays[unit.block][unit.kind]) > 1

    def remove(unit: Unit) -> None:
        if unit.kind == "gate":
            del left[unit.block]
        else:
            stays[unit.block][unit.kind][unit.number] = False
            left[unit.block] -= price(unit)

    units = _weakest_first(mask, scores)
    for unit in units:
        if unit.mask < threshold and may_go(unit):
            remove(unit)
    too_dear = []
    for unit in units if final else []:
        if unit.mask >= threshold and may_go(unit):
            if sum(left.values()) - price(unit) < target * (1 - EXACT):
                too_dear.append(unit)
            else:
                remove(unit)
    while candidates := [unit for unit in too_dear if may_go(unit)]:
        remove(min(candidates, key=price))
    kept, narrow = tuple(sorted(left)), {}
    for block in kept:
        heads, channels = (_indices(stays[block].get(kind)) for kind in ("attn.gate", "mlp.gate"))
        if heads is not None or channels is not None:
            narrow[block] = Narrowing(heads, channels)
    return Removal(kept, narrow, sum(left.values()))


def raised(mask: Mask, kept_blocks: Iterable[int], narrow: Mapping[int, Narrowing], least: float) -> Mask:
    """The mask with at least this much for every unit that stays: a gate of 0 could not be folded."""
    found: Mask = {}
    present = set(kept_blocks)
    for block, of_block in mask.items():
        found[block] = {}
        stays = narrow.get(block, Narrowing())
        for kind, m in of_block.items():
            kept = {"attn.gate": stays.heads, "mlp.gate": stays.channels}.get(kind)
            raised_to = m.clamp(min=least) if block in present else m
            if kept is not None:
                goes = torch.ones(len(m), dtype=torch.bool)
                goes[list(kept)] = False
                raised_to = torch.where(goes, m, raised_to)
            found[block][kind] = raised_to
    return found


def _weakest_first(mask: Mask, scores: Mask) -> list[Unit]:
    """Every unit, in the order of removal."""
    found = []
    for block, of_block in mask.items():
        for kind, m in of_block.items():
            pairs = zip(m.reshape(-1).tolist(), scores[block][kind].reshape(-1).tolist(), strict=True)
            found += [Unit(value, score, block, kind, i) for i, (value, score) in enumerate(pairs)]
    return sorted(found, key=lambda unit: (unit.mask, -unit.score, -unit.block, -unit.number))


def _indices(stays: list[bool] | None) -> tuple[int, ...] | None:
    """Positions of what stays; None when all does."""
    return None if stays is None or all(stays) else tuple(i for i, stay in enumerate(stays) if stay)


def _shrunk(of_block: dict[str, Tensor], stays: Narrowing) -> dict[str, Tensor]:
    kept = {"gate": None, "attn.gate": stays.heads, "mlp.gate": stays.channels}
    return {kind: m if kept[kind] is None else m[list(kept[kind] or ())] for kind, m in of_block.items()}
