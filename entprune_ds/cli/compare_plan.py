"""The rows of a comparison: which trainings there are, their settings, and which of them a study puts side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entprune_ds.cli.compare_base import further_base
from entprune_ds.config import Config, DataConfig, ModelConfig, digest, to_dict
from entprune_ds.config_checks_compare import criteria_of
from entprune_ds.pruning.schedule import planned_checks
from entprune_ds.soft_budget import removal_steps

SOFT_UPDATES = 25
"""Updates of the mask in a soft row: enough for it to close."""
NOTHING_TO_VOTE = {"ntk_samples": 2, "ntk_repeats": 1, "zico_batches": 2, "zico_batch_size": 1}
"""A single check has a single candidate depth, the target: its proxies decide nothing and are made cheap."""
FREE_OF_RESULT = ("run", "compare", "evaluate", "monitor")
"""Sections that do not change what a row finds."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run of the comparison."""

    name: str
    """Also the name of its run folder."""
    criterion: str
    """What chooses the blocks, as it is called in the tables."""
    seed: int
    target_depth: int
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    """Settings in which it differs from the command's, as {"section.name": value}."""
    probes: tuple[int, ...] = ()
    """Steps whose validation loss is recorded."""
    long: bool = False
    """Whether it is trained and measured to compare.long_steps too."""
    samplings: tuple[int, ...] = ()
    """Sampler steps with which it is sampled besides."""
    base: int | None = None
    """Seed of the further base from which it starts; None for the common one."""


@dataclass(frozen=True)
class Study:
    """Rows side by side: {contestant: its rows, one per seed}."""

    name: str
    contestants: dict[str, list[Row]]


def one_check(config: Config, criterion: str, seed: int, label: str = "", **changes: Any) -> Row:
    """A row that removes everything at step 0. The last "__" in the name of a change stands for the dot."""
    label = label or Path(criterion).stem
    settings = {"prune.criterion": criterion} | {k.replace("__", "."): v for k, v in changes.items()}
    depth = changes.get("prune__target_depth", config.prune.target_depth or 1)
    return Row(name=f"{label}-s{seed}", criterion=label, seed=seed, target_depth=depth, changes=settings)


def studies(config: Config, model: ModelConfig) -> list[Study]:
    """Every study that is asked for; rows of the same name are the same row.

    Args:
        config: of the command.
        model: architecture of the base.
    """
    makers = {
        "criteria": _criteria, "subsets": _subsets, "schedule": _schedule, "estimators": _estimators,
        "distill": _distill, "depth": _depth, "bases": _bases,
    }  # fmt: skip
    return [Study(name, makers[name](config, model)) for name in config.compare.study if name in makers]


def rows_of(found: list[Study]) -> list[Row]:
    """Every row once, with all that any study asks of it; seed by seed, so that what is cut short is even.

    Rows of further bases come last: these are trained meanwhile.
    """
    rows: dict[str, Row] = {}
    for row in (row for study in found for rows in study.contestants.values() for row in rows):
        other = rows.get(row.name, row)
        samplings = tuple(sorted({*row.samplings, *other.samplings}))
        rows[row.name] = replace(
            row, probes=row.probes or other.probes, samplings=samplings, long=row.long or other.long
        )
    return sorted(rows.values(), key=lambda row: (row.base is not None, row.seed))


def _criteria(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    first = config.compare.seeds[0]
    for criterion in criteria_of(config):
        for rows in _contestants(config, model, criterion):
            found[rows[0].criterion] = [_extended(config, row) if row.seed == first else row for row in rows]
    return found


def _contestants(config: Config, model: ModelConfig, criterion: str) -> Iterator[list[Row]]:
    """The rows of a criterion, one per seed; those of each random keep-set, which is the same for all seeds."""
    seeds = config.compare.seeds
    if criterion != "random":
        yield [one_check(config, criterion, seed) for seed in seeds]
        return
    for i, gone in enumerate(random_removals(config, model, "random", config.compare.random_sets), 1):
        yield [one_check(config, "explicit", seed, f"random_{i}", prune__explicit_order=gone) for seed in seeds]


def _extended(config: Config, row: Row) -> Row:
    """The first seed's rows of the criteria take part in the studies of subsets and of samplers."""
    if "subsets" in config.compare.study:
        row = replace(row, long=True, probes=config.compare.probe_steps)
    if "sampling" in config.compare.study:
        row = replace(row, samplings=config.compare.sampling_steps)
    return row


def _subsets(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    """Different random keep-sets, one seed."""
    sets, seed = random_removals(config, model, "subsets", config.compare.subsets), config.compare.seeds[0]
    rows = [
        one_check(config, "explicit", seed, f"set_{i:02d}", prune__explicit_order=gone)
        for i, gone in enumerate(sorted(sets))
    ]
    return {row.criterion: [replace(row, long=True, probes=config.compare.probe_steps)] for row in rows}


def random_removals(config: Config, model: ModelConfig, purpose: str, count: int) -> list[tuple[int, ...]]:
    """Blocks that go, sorted, so that different random keep-sets stay: `count`, or fewer where there are not so many.

    A pure function of its arguments. Protected blocks stay.
    """
    from entprune_ds.rng import permutation

    protected = replace(config, model=model).protected_blocks
    free = [block for block in model.blocks if block not in protected]
    stay, found = (config.prune.target_depth or 1) - len(protected), dict[tuple[int, ...], None]()
    wanted, number = min(count, math.comb(len(free), max(0, stay))), 0
    while len(found) < wanted:
        order = permutation(0, f"compare/{purpose}", 0, number, len(free))
        found[tuple(sorted(free[place] for place in order[stay:]))] = None
        number += 1
    return list(found)


def _schedule(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    """Progressive against one-shot; voted, with several weights, against a fixed schedule; one-shot against soft."""
    checks, criterion = config.compare.num_checks, config.prune.criterion
    per_check = -(-(len(model.blocks) - (config.prune.target_depth or 1)) // checks)
    end = round(config.compare.phase * config.compare.recovery_steps)
    progressive = {"prune__num_checks": checks, "prune__end_step": end}
    weights = {"ntk": (1.0, 0.0, 0.0), "zico": (0.0, 1.0, 0.0), "ntk_zico": (0.5, 0.5, 0.0), "time": (1.0, 0.5, 0.5)}
    kinds: dict[str, dict[str, Any]] = {f"vote_{kind}": {"prune__vote_weights": w} for kind, w in weights.items()}
    kinds = {"fixed": {"prune__max_blocks_per_check": per_check}, **kinds}
    stem, seeds = Path(criterion).stem, config.compare.seeds
    found = {"one_shot": [one_check(config, criterion, seed) for seed in seeds]}
    for kind, changes in kinds.items():
        rows = [one_check(config, criterion, s, f"{stem}_{kind}", **progressive, **changes) for s in seeds]
        found[f"progressive, {kind}"] = rows
    entpruner = {**progressive, "prune__vote_weights": weights["ntk_zico"]}
    if criterion != "ced":  # the published method as a whole
        rows = [one_check(config, "ced", s, "ced_vote_ntk_zico", **entpruner) for s in seeds]
        found["ced, progressive, vote_ntk_zico (EntPruner)"] = rows
    soft = {"soft__every": max(1, end // SOFT_UPDATES), "soft__end_step": end, "soft__removals": min(checks, end)}
    found["gradient flow, one_shot"] = [one_check(config, "gradient_flow", s) for s in seeds]
    found["gradient flow, soft"] = [one_check(config, "gradient_flow", s, "gradient_flow_soft", **soft) for s in seeds]
    return found


def _estimators(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    found = {}
    for name in config.compare.estimators:
        same = name == config.score.estimator  # the rows of the criterion itself
        changes, label = ({}, "") if same else ({"score__estimator": name}, f"ced_{name}")
        found[name] = [one_check(config, "ced", seed, label, **changes) for seed in config.compare.seeds]
    return found


def _distill(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    criterion, found = config.prune.criterion, {}
    for kind in config.compare.recoveries:
        same = kind == config.distill.kind  # the rows of the criterion itself
        changes, label = ({}, "") if same else ({"distill__kind": kind}, f"{Path(criterion).stem}_kd_{kind}")
        found[kind] = [one_check(config, criterion, seed, label, **changes) for seed in config.compare.seeds]
    return found


def _depth(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    criterion, found = config.prune.criterion, {}
    for depth in config.compare.depths:
        same = depth == config.prune.target_depth
        changes = {} if same else {"prune__target_depth": depth}
        label = "" if same else f"{Path(criterion).stem}_depth_{depth}"
        found[f"depth {depth}"] = [one_check(config, criterion, s, label, **changes) for s in config.compare.seeds]
    return found


def _bases(config: Config, model: ModelConfig) -> dict[str, list[Row]]:
    """Every criterion from every base: the first seed's rows of the criteria, and one row for each further base."""
    found = {}
    for name, (first, *_) in _criteria(config, model).items():
        plain = replace(first, probes=(), long=False, samplings=())
        found[name] = [first] + [replace(plain, name=f"{name}-b{b}", seed=b, base=b) for b in config.compare.bases]
    return found


def row_config(config: Config, row: Row, model: ModelConfig, out: Path) -> Config:
    """The settings of a row's training, up to compare.recovery_steps.

    Args:
        config: of the command.
        row: the row.
        model: architecture of the base, and as its weights the base itself.
        out: folder of the comparison.

    Raises:
        ValueError: naming a setting of the row that does not exist.
    """
    steps = config.compare.recovery_steps
    if row.base is not None:
        model = replace(model, weights=str(further_base(out, row.base)))
    common = replace(
        config, model=model,
        run=replace(config.run, name=row.name, root=str(out / "rows"), seed=row.seed),
        train=replace(config.train, num_steps=steps, checkpoint_every=max(25, steps // 3), keep_checkpoints=1,
                      validate_every=10**9, stop_step=None),
        prune=replace(config.prune, num_checks=1, start_step=0, end_step=1, max_blocks_per_check=None,
                      score_only=False, rollback=""),
        score=replace(config.score, sweep="needed"), soft=replace(config.soft, every=0),
        monitor=replace(config.monitor, wandb=False, log_every=25, sample_every=0, count_macs=True),
        sample=replace(config.sample, grid=min(config.sample.grid, 20)),
    )  # fmt: skip
    changed = with_settings(common, row.changes)
    if changed.prune.num_checks == 1:
        changed = with_settings(changed, {f"prune.{k}": v for k, v in NOTHING_TO_VOTE.items()})
    return changed


def removals(settings: Config) -> list[int]:
    """Steps at which a row may remove blocks."""
    return removal_steps(settings) if settings.soft.every else planned_checks(settings)


def with_settings(config: Config, changes: dict[str, Any]) -> Config:
    """The config with some settings changed.

    Raises:
        ValueError: naming a setting that does not exist.
    """
    for key, value in changes.items():
        section, _, name = key.partition(".")
        group = getattr(config, section)
        if name not in {f.name for f in dataclasses.fields(group)}:
            raise ValueError(f"`{key}` is not a setting.")
        config = replace(config, **{section: replace(group, **{name: value})})
    return config


def row_digest(settings: Config) -> str:
    """Digest of everything in a row's settings that changes what it finds. Base and data: see `sources`."""
    return digest(row_values(settings))


def row_values(settings: Config) -> dict[str, Any]:
    """Everything in a row's settings that changes what it finds, by section."""
    prune, race = settings.prune, settings.prune.criterion == "recovery_race"
    members = prune.combined_weights if prune.criterion == "combined" else {}
    learned = "learned" in (prune.criterion, *members, *(settings.race.origins if race else ()))
    unread = {name for name, read in (("race", race), ("learned", learned)) if not read}
    values = {k: v for k, v in to_dict(settings).items() if k not in {*FREE_OF_RESULT, *unread}}
    values["model"] = {k: v for k, v in values["model"].items() if k != "weights"}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("shards", "val_shards")}
    values["data"] |= {"num_workers": 0, "prefetch": DataConfig().prefetch}  # these change nothing but speed
    values["sample"] = {k: v for k, v in values["sample"].items() if k not in ("grid", "out")}
    values["prune"] |= {} if members else {"combined": []}
    values |= {"code": digest(Path(prune.criterion).read_text())} if prune.criterion.endswith(".py") else {}
    return values | {"seed": settings.run.seed}
