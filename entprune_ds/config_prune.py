"""Settings of the pruning: what goes, when and how much (`prune.*`), and how blocks are scored (`score.*`)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    target_depth: int | None = None
    """Blocks that remain at the end; null trains without pruning."""
    criterion: str = "ced"
    """Which blocks go first: ced, ced_abs, loss, mse, ld_pruner, flux_lite, shortgpt, magnitude_l1, magnitude_l2,
    taylor, diff_pruning, spread_taylor, gradient_flow, learned, recovery_race, random, every_other, explicit, combined,
    or a .py file of yours. ced is the paper's; docs/CRITERIA.md says what healed best, and the presets take that."""
    explicit_order: tuple[int, ...] = ()
    """criterion=explicit: original block indices in the order of removal."""
    combined: tuple[str, ...] = ()
    """criterion=combined: its members as NAME:WEIGHT, e.g. [ced:1,loss:0.5]; the places that they give are averaged."""
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

    @property
    def combined_weights(self) -> dict[str, float]:
        """`combined` as {criterion: weight}.

        Raises:
            ValueError: when a member is not NAME:WEIGHT, its weight not above 0, or its name there twice.
        """
        weights: dict[str, float] = {}
        for member in self.combined:
            name, _, weight = member.partition(":")
            if name in weights or not re.fullmatch(r"(\d+\.?\d*|\.\d+)", weight) or float(weight) == 0:
                message = "`prune.combined` must list different criteria as NAME:WEIGHT, each weight above 0, "
                raise ValueError(message + f"such as [ced:1,loss:0.5], got {member}.")
            weights[name] = float(weight)
        return weights


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
    unit: str = "block"
    """Scored for the record beside blocks, as e.g. ced/attention: block (no more), or branches attention or mlp."""
    mode: str = "once"
    """once ranks the blocks by one scoring; greedy scores again, on the same draws, after each block that goes."""
    stack_memory: int = 8192
    """Most MiB that a rank's streams may take in a sweep; greedy keeps those of earlier rounds in what remains."""
    estimator: str = "per_element"
    """Entropy: per_element, per_channel, scalar (Gaussian), low_rank (with its covariance) or knn (of any shape)."""
    timestep_buckets: int = 1
    """Entropies are averaged over this many equal parts of the time axis; 1 pools them."""
    within_class: tuple[int, ...] = ()
    """Classes over which entropies are averaged, the only ones drawn, in equal numbers; empty pools all classes."""
    rank: int = 32
    """estimator=low_rank: directions; every cell (timestep bucket x class) needs 10 draws for each."""
    shrinkage: float = 0.0
    """estimator=low_rank: share a of (1 - a) S + a tr(S) / d I, which keeps the covariance S away from singular."""
    knn_dim: int = 8
    """estimator=knn: directions d; every cell (timestep bucket x class) needs 2^(d + 1) draws."""
    knn_k: int = 3
    """estimator=knn: which nearest neighbour."""
    basis: str = "pca"
    """estimator=low_rank, knn: the directions of largest variance of the full model's output (pca), or random ones."""
    until: str = "draws"
    """draws: score.draws are drawn; resolved: more, until the blocks that may go differ from all that then stay."""
    max_draws: int = 8192
    """until=resolved: most draws. The blocks are the most that the check may remove; their own order may stay open."""
    confidence: float = 0.95
    """Two blocks differ when their paired difference is not 0 at this confidence (two-sided, by jackknife)."""
    gradient_batches: int = 8
    """taylor, diff_pruning, gradient flow: batches of draws; each is a jackknife group of the standard errors."""
    gradient_batch_size: int = 32
    """Draws of such a batch over all ranks; diff_pruning takes as many evenly spaced t, one of each a batch."""
    taylor_t: tuple[float, ...] = ()
    """taylor: chosen t in [0, 1) (t of SiT, timestep / 1000 of DiT); empty draws t as training does."""
    diff_pruning_threshold: float = 0.05
    """diff_pruning: gradients count at those t whose loss is above this share of the largest loss of all t."""
    criteria: tuple[str, ...] = ()
    """`entprune-ds score`: criteria to measure; empty means all."""
    weights: str = "raw"
    """`entprune-ds score`: of a run or a checkpoint, the raw training weights, as checks do, or the ema ones."""
    out: str = ""
    """`entprune-ds score`: folder to write; empty: `scores` in the run folder, or here."""

    @property
    def gradient_draws(self) -> int:
        """Draws of the gradient criteria."""
        return self.gradient_batches * self.gradient_batch_size

    @property
    def cells(self) -> int:
        """Parts of the draws whose entropies are averaged."""
        return self.timestep_buckets * max(1, len(self.within_class))

    @property
    def draws_per_cell(self) -> int:
        """Draws that the estimator needs in every cell."""
        fewest = 2 if self.cells == 1 else 32
        return max(fewest, {"low_rank": 10 * self.rank, "knn": max(32, 2 ** (self.knn_dim + 1))}.get(self.estimator, 0))
