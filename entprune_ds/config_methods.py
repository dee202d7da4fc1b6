"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """criterion=recovery_race."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    """criterion=learned."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Gradient-flow soft pruning."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation."""


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
    """What to compare: criteria, subsets, schedule, estimators, distill, sampling, depth; prune.criterion is the one
    criterion of schedule, distill and depth."""
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
    workers: int = 2
    """Processes that train rows, one thread each; several commands may share the folder besides."""
    out: str = "runs/compare"
    """Folder of the comparison (shortcut: out=DIR)."""
