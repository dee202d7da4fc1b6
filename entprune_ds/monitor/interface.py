"""What the trainer sees of monitoring: six methods, and a null object for the ranks that do not log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Monitor(Protocol):
    """Where figures, pictures and decisions of a run go. Not collective: rank 0 logs, the others do nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record plain numbers, named group/name, at an optimizer step."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file that is already on disk."""
        ...

    def decision(self, decision: Mapping[str, Any]) -> None:
        """Show a pruning decision, in its decisions.jsonl form: score table, heat map, vote, event, depth."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final figures (nested plain values)."""
        ...

    def artifact(self, folder: Path, name: str, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """Hand over a folder, such as the exported model, with what it was made from (see lineage.py)."""
        ...

    def finish(self, exit_code: int = 0, hurry: bool = False) -> None:
        """Close everything, with a short wait in a `hurry`; `exit_code` above 0 marks the run as failed.

        A second call does nothing.
        """
        ...


class NullMonitor:
    """A Monitor that does nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Nothing."""

    def decision(self, decision: Mapping[str, Any]) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def artifact(self, folder: Path, name: str, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0, hurry: bool = False) -> None:
        """Nothing."""
