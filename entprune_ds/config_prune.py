"""Settings of the pruning: what goes, when and how much (`prune.*`), and how blocks are scored (`score.*`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    target_depth: int | None = None
    """Blocks that remain at the end; null trains without pruning."""
    criterion: str = "ced"
    """Which blocks go first: ced, ced_abs, loss, random, every_other, explicit or gradient_flow."""
    explicit_order: tuple[int, ...] = ()
    """criterion=explicit: original block indices in the order of removal."""
    num_checks: int = 4
    """Pruning checks; one stands at the start of each of this many equal parts of the pruning phase."""
    start_step: int = 0
    """First step of the pruning phase."""
    end_step: int | None = None
    """End of the pruning phase; null means train.num_steps."""
    max_blocks_per_check: int | None = None
    """Cap of every check; null means ceil(2 (depth - target_depth) / num_checks)."""
    ntk_samples: int = 16
    """Samples of the NTK condition number."""
    ntk_repeats: int = 3
    """Repeats of the NTK condition number; the median counts."""
    zico_batches: int = 8
    """Fixed batches of the ZiCo score."""
    zico_batch_size: int = 16
    """Examples per ZiCo batch."""
    vote_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of the NTK rank and of the ZiCo rank in the vote."""
    vote_tolerance: float = 0.01
    """Relative difference below which two candidate depths tie."""
    score_only: bool = False
    """Run every check and record its decision, but remove nothing."""
    regrow_micro_batch: bool = False
    """Use the memory that removals free: larger micro-batches and fewer accumulation steps at the same global batch."""
    rollback: str = ""
    """Go back to the checkpoint before a removal, e.g. step_400, once; the other prune.* settings may then change."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    draws: int = 1024
    """Paired draws (example, t, noise) of the block scores."""
    batch_size: int = 128
    """Draws scored together over all ranks; also the size of a jackknife group of the standard errors."""
    dtype: str = "float32"
    """Precision of the scoring passes: float32 or float64."""
    sweep: str = "always"
    """One-sweep scores at a check: always, for the record; or needed, only where the criterion depends on them."""
    gradient_draws: int = 64
    """Draws of the gradient-flow scores; the loss whose squared gradient norm they are about is the mean over them."""
    gradient_batch_size: int = 16
    """Draws of the gradient-flow scores that pass a block together over all ranks; a group of their standard errors."""
