"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CRITERIA = (
    "ced", "ced_abs", "loss", "random", "every_other", "explicit",
    "mse", "ld_pruner", "flux_lite", "shortgpt",
    "magnitude_l1", "magnitude_l2", "taylor", "diff_pruning", "spread_taylor", "learned", "combined", "gradient_flow",
    "recovery_race",
)  # fmt: skip
SWEEP_CRITERIA = ("ced", "ced_abs", "loss", "mse", "ld_pruner", "flux_lite", "shortgpt")
"""Those whose order depends on the scores of a sweep."""
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "entpruner": {
        "prune": {"criterion": "ced", "num_checks": 4, "max_blocks_per_check": None, "vote_weights": [1.0, 1.0, 0.0]},
        "soft": {"every": 0},
    },
    "gradient_flow": {"prune": {"criterion": "gradient_flow"}, "soft": {"every": 10}},
    "race": {
        "prune": {"criterion": "recovery_race", "num_checks": 1, "max_blocks_per_check": None},
        "soft": {"every": 0},
    },
}
"""prune.method: what each sets, above the preset and below the words of the command line."""


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """criterion=recovery_race: keep-sets recover for a few steps each, and the one that recovers best stays."""

    budget: float = 0.05
    """Share of the run's compute (train.num_steps x global batch x present blocks) that all its races may take."""
    candidates: int | None = None
    """Keep-sets at the start of a race; null takes what the budget allows, at most 32."""
    first_steps: int | None = None
    """Recovery steps of the first round, doubled in every later one; null takes what the budget allows."""
    batch_size: float = 0.25
    """Examples of a trial step as a share of train.global_batch_size."""
    validation_draws: int = 256
    """Fixed draws (example, t, noise) of the training shards that judge a candidate; its forward passes count too."""
    learning_rate: float | None = None
    """Learning rate of the trial steps; null takes the run's, as it is after the warm-up."""
    origins: tuple[str, ...] = ("spaced", "criteria", "random")
    """Where keep-sets come from: spaced (evenly), criteria (the order of every score of the sweep, which costs more
    than a short race), random, or criteria by name, such as taylor, which are measured for the race."""
    replicas: str = "auto"
    """Whether each rank trains candidates of its own: true, false (all ranks train one, sharded), auto (if it fits)."""
    local_search: int = 0
    """Keep-sets one swap away from the winner that race against it, with half of the budget; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    steps: int = 200
    """Steps in which the gates are learned, at every check."""
    batch_size: int = 64
    """Draws of a step over all ranks."""
    group_size: int = 4
    """Most blocks that choose their mask together; more of them see more combinations and take longer to learn."""
    learning_rate: float = 1e-3
    """Learning rate of the logits (Adam)."""
    tau: tuple[float, float] = (4.0, 0.1)
    """Temperature of the Gumbel-softmax at the first and at the last step, linear between them."""
    scale: float = 100.0
    """Factor of the logits."""
    lora_rank: int = 8
    """Rank of the LoRA of every linear layer of the blocks, which simulates recovery; 0 switches it off."""
    lora_learning_rate: float = 1e-4
    """Learning rate of the LoRA (Adam)."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Gradient-flow soft pruning."""

    every: int = 0
    """Steps between updates of the mask; 0 switches soft pruning off. It takes the place of the pruning checks."""
    units: tuple[str, ...] = ("block",)
    """What is gated and removed: some of block, head and channel (of the MLP)."""
    target_macs: float | None = None
    """Share of the blocks' multiply-accumulates that remains at the end; null takes prune.target_depth / depth."""
    schedule: str = "cubic"
    """How the budget shrinks from 1 to the target: linear, or cubic (fast first, slow at the end)."""
    start_step: int = 0
    """Step from which the budget shrinks."""
    end_step: int | None = None
    """Step of the last update, which reaches the target; null means three quarters of train.num_steps."""
    removals: int = 4
    """Updates, evenly over all, at which units under the threshold are removed for good; the last is one of them."""
    eta: float = 0.05
    """Step size of an update: a unit whose score is one standard deviation above the mean loses that much."""
    budget_weight: float = 8.0
    """Lambda: weight of the squared distance of the multiply-accumulates from their budget."""
    threshold: float = 0.1
    """A unit whose mask is below it at a removal goes."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    kind: str = "none"
    """What is learned from the teacher: none; output (its prediction); features (that, and its hidden states)."""
    teacher: str = ""
    """The unpruned model, in any format of model.weights; empty: model.weights, which must then hold EMA weights."""
    start: int | None = None
    """First step with the teacher; null: the first removal, or step 0 if the run starts with fewer blocks."""
    plain_weight: float = 0.1
    """Weight of the training loss."""
    output_weight: float = 0.9
    """Weight of the distance from the teacher's prediction."""
    feature_weight: float | None = None
    """kind=features: first weight of the hidden states, falling linearly to 0 at the end; null: dit 1e-2, sit 2e-4."""
    feature_sigma: float = 2.0
    """kind=features: elements further from the mean in student or teacher, in standard deviations, are left out."""
    placement: str = "sharded"
    """Where the teacher lies: sharded (a part of every block on every rank, gathered block by block) or whole."""
    dtype: str = "train"
    """Precision of the teacher: train (that of the training's forward pass), float32 or bfloat16."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`entprune-ds compare`: one training per criterion and seed, all from the same base on the same draws."""

    criteria: tuple[str, ...] = ()
    """Criteria to compare (shortcut: criteria=[ced,loss]); empty means all but explicit and combined."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings (shortcut: seeds=[0,1]): order of the data, noise, and the draws of the checks."""
    base: str = ""
    """Model to prune (shortcut: base=DIR); empty trains one from the preset, with base_depth blocks."""
    base_depth: int = 12
    """Blocks of the base that is trained here."""
    base_steps: int = 2000
    """Optimizer steps of the base that is trained here."""
    recovery_steps: int = 150
    """Optimizer steps of a row, from the base on; with this many plain steps at the target depth as the compute of all
    (equal_compute), a criterion that spends compute on scoring trains for fewer."""
    equal_compute: bool = True
    """Measure every row where its total compute, checks included, is that of recovery_steps plain steps, and again at
    recovery_steps; false measures at recovery_steps only."""
    random_sets: int = 3
    """criterion random: so many different keep-sets, each trained with every seed."""
    study: tuple[str, ...] = ("criteria",)
    """What to compare: criteria, subsets, schedule, estimators, distill, sampling, depth, bases; prune.criterion is the
    one criterion of schedule, distill and depth."""
    subsets: int = 30
    """study subsets: random keep-sets; those of the criteria (first seed) join them."""
    long_steps: int = 600
    """study subsets: steps of the long recovery."""
    probe_steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    """study subsets: recovery steps after which the validation loss is taken as a score of the keep-set."""
    num_checks: int = 4
    """study schedule: checks of the progressive rows (all other rows have one, at step 0)."""
    phase: float = 0.5
    """study schedule: share of recovery_steps in which these checks stand."""
    estimators: tuple[str, ...] = ()
    """study estimators: values of score.estimator, each with criterion ced."""
    recoveries: tuple[str, ...] = ("none", "output", "features")
    """study distill: values of distill.kind."""
    sampling_steps: tuple[int, ...] = (10, 25, 50, 250)
    """study sampling: sampler steps with which the rows of the first seed are sampled."""
    depths: tuple[int, ...] = ()
    """study depth: further target depths."""
    bases: tuple[int, ...] = ()
    """study bases: seeds of further bases, trained here like the first; every criterion prunes each of them once."""
    workers: int = 2
    """Processes that train rows, one thread each; several commands may share the folder besides."""
    out: str = "runs/compare"
    """Folder of the comparison (shortcut: out=DIR)."""
