"""A decision is a value: frozen, JSON, with a digest; replaying decisions.jsonl gives the same model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from entprune_ds.config import digest as digest_of
from entprune_ds.pruning.surgery import Narrowing

LATER: dict[str, Any] = {"cut": None, "narrow": {}, "race": {}, "held": "", "state": {}}
"""Fields that older records do not have, and their empty values."""


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """What one check found and chose. Fields are plain values; a number that is not finite is stored as None."""

    check: int
    """Number of the check, from 0."""
    step: int
    """Optimizer steps done before the check."""
    criterion: str
    """Criterion that made the order."""
    kept_before: tuple[int, ...]
    """Present blocks before the check, sorted original indices."""
    dropped: tuple[int, ...]
    """Blocks that go."""
    kept_blocks: tuple[int, ...]
    """Blocks that stay."""
    order: tuple[int, ...]
    """All present blocks, first to go first; empty where the check was held and ranked nothing."""
    scores: dict[str, dict[str, dict[str, float | None]]]
    """{criterion: {block: {"value", "standard_error"}}}."""
    candidates: list[dict[str, Any]]
    """The vote: the fields of a RankedCandidate for every candidate; none where the check was held."""
    chosen_depth: int
    """Depth that won."""
    forced: bool
    """Whether keeping the current depth was not among the candidates."""
    reason: str
    """One sentence for people."""
    score_only: bool
    """Whether this is a record of what would be done: nothing was removed."""
    cut: tuple[int, ...] | None = None
    """Blocks per pipeline stage from now on; None without a pipeline."""
    narrow: dict[int, Narrowing] = field(default_factory=dict)
    """Attention heads and MLP channels that stay, by block; blocks that are not named stay as wide as they are."""
    race: dict[str, Any] = field(default_factory=dict)
    """criterion=recovery_race: candidates {"kept_blocks", "origin"}, rounds {"steps", "losses"}, winner, executor,
    batch_size, share_of_run; empty where nothing raced."""
    held: str = ""
    """Why the check had to wait and removed no more than it must, as a clause; empty when it was free to choose."""
    state: dict[str, Any] = field(default_factory=dict)
    """What the choice was made from beside scores and candidates, see policy.CheckState; empty in older records."""

    def __post_init__(self) -> None:
        for name in ("kept_before", "dropped", "kept_blocks", "order"):
            object.__setattr__(self, name, tuple(int(b) for b in getattr(self, name)))
        if self.cut is not None:
            object.__setattr__(self, "cut", tuple(int(count) for count in self.cut))
        for name in ("scores", "candidates", "race", "state"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "narrow", {int(b): Narrowing(**_fields(n)) for b, n in sorted(self.narrow.items())})
        before = list(self.kept_before)
        ranked = sorted(self.order) == before or (not self.order and not self.dropped)
        if sorted(self.dropped + self.kept_blocks) != before or not ranked:
            raise ValueError(
                f"decision of check {self.check}: dropped {list(self.dropped)} and kept {list(self.kept_blocks)} "
                f"blocks, and the order {list(self.order)}, must each make up the blocks before it, {before}."
            )
        if self.chosen_depth != len(self.kept_blocks):
            raise ValueError(
                f"decision of check {self.check}: chosen depth {self.chosen_depth} is not the number "
                f"of kept blocks, {len(self.kept_blocks)}."
            )
        if self.cut is not None and sum(self.cut) != len(self.kept_blocks):
            raise ValueError(
                f"decision of check {self.check}: the cut {list(self.cut)} does not add up to the number of kept "
                f"blocks, {len(self.kept_blocks)}."
            )
        if not set(self.narrow) <= set(self.kept_blocks):
            raise ValueError(
                f"decision of check {self.check}: it narrows blocks {list(self.narrow)}, which must be among the kept "
                f"blocks, {list(self.kept_blocks)}."
            )

    @property
    def removes(self) -> bool:
        """Whether anything goes: blocks, heads or MLP channels."""
        return bool(self.dropped or self.narrow)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all fields; without those of LATER where they are empty."""
        values = plain(asdict(self))
        return digest_of({k: v for k, v in values.items() if k not in LATER or v != LATER[k]})

    def to_json(self) -> dict[str, Any]:
        """Plain values of one line of decisions.jsonl, the digest last."""
        return plain(asdict(self)) | {"digest": self.digest}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PruneDecision:
        """The decision that `to_json` wrote.

        Raises:
            ValueError: when a field is missing, unknown or inconsistent, or the digest does not fit.
        """
        values = LATER | values
        names = {field.name for field in fields(cls)}
        wrong = sorted(set(values) ^ (names | {"digest"}))
        if wrong:
            raise ValueError(f"a decision has missing or unknown fields: {', '.join(wrong)}.")
        decision = cls(**{name: values[name] for name in names})
        if decision.digest != values["digest"]:
            raise ValueError(
                f"decision of check {values['check']} at step {values['step']} does not match its digest: "
                "the record was changed. Restore decisions.jsonl from the checkpoint."
            )
        return decision


def _fields(stays: Narrowing | dict[str, Any]) -> dict[str, Any]:
    return stays if isinstance(stays, dict) else vars(stays)


def plain(value: Any) -> Any:
    """JSON values: keys become text, tuples lists, NaN and infinities None."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
