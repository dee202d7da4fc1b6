"""Settings of the pruning: what goes, when and how much (`prune.*`), and how blocks are scored (`score.*`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    target_depth: int | None = None
    """Blocks that remain at the end; null trains without pruning."""
    criterion: str = "ced"
    """Which blocks go first: ced, ced_abs, loss, random, every_other or explicit."""
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
    vote_weights: tuple[float, ...] = (1.0, 1.0, 0.0)
    """Weights of the NTK rank, the ZiCo rank and the rank of the step time, which is measured only if it votes."""
    vote_tolerance: float = 0.01
    """Relative difference below which two candidate depths tie."""
    score_only: bool = False
    """Run every check and record its decision, but remove nothing."""
    regrow_micro_batch: bool = False
    """Use the memory that removals free: larger micro-batches and fewer accumulation steps at the same global batch."""
    rollback: str = ""
    """Go back to the checkpoint before a removal, e.g. step_400, once; the other prune.* settings may then change."""
    method: str = ""
    """Defaults of a whole method, under what is set beside it: entpruner, gradient_flow or race; empty: none."""
    protected_blocks: tuple[int, ...] = ()
    """Blocks that never go, by original index; negative ones count from the end: [0,-1] are the first and the last."""
    min_steps_between: int = 0
    """Steps from one removal to the next; a check before that removes nothing, and the others make up for it."""
    recovery_tolerance: float | None = None
    """A check removes nothing, unless the cap forces it, while the validation loss lies more than this share above
    its trend from before the last removal, e.g. 0.05; null does not look at it."""


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
    criteria: tuple[str, ...] = ()
    """`entprune-ds score`: criteria to measure; empty means all."""
    weights: str = "raw"
    """`entprune-ds score`: of a run or a checkpoint, the raw training weights, as checks do, or the ema ones."""
    out: str = ""
    """`entprune-ds score`: folder to write; empty: `scores` in the run folder, or here."""
