"""Impossible settings of `entprune-ds compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entprune_ds.config_checks_prune import CRITERIA
from entprune_ds.config_schema import Config

STUDIES = ("criteria", "subsets", "schedule", "estimators", "distill", "sampling", "depth", "bases")
NOT_COMPARED = ("explicit", "combined")
"""Criteria that need settings of their own, and are compared only when they are named."""


def criteria_of(config: Config) -> tuple[str, ...]:
    """The criteria that are compared."""
    return config.compare.criteria or tuple(c for c in CRITERIA if c not in NOT_COMPARED)


def compare_problems(config: Config) -> list[str]:
    """Impossible values of `compare.*`, and of other settings in a comparison."""
    compare, found = config.compare, []
    unknown = [s for s in compare.study if s not in STUDIES]
    if unknown or not compare.study:
        found.append(f"`compare.study` must be among {', '.join(STUDIES)}, got {', '.join(unknown) or 'nothing'}.")
    if not compare.seeds or min(compare.seeds) < 0:
        found.append(f"`compare.seeds` must be one or more numbers of at least 0, got {list(compare.seeds)}.")
    for key in ("criteria", "seeds", "study", "estimators", "recoveries", "depths", "sampling_steps", "bases"):
        values = getattr(compare, key)
        if len(set(values)) < len(values):
            found.append(f"`compare.{key}` names something twice: {list(values)}.")
    for key in ("base_depth", "base_steps", "recovery_steps", "random_sets", "subsets", "num_checks", "workers"):
        if getattr(compare, key) < 1:
            found.append(f"`compare.{key}` must be at least 1, got {getattr(compare, key)}.")
    for key in ("depths", "probe_steps", "sampling_steps"):
        if any(value < 1 for value in getattr(compare, key)):
            found.append(f"`compare.{key}` must hold numbers of at least 1, got {list(getattr(compare, key))}.")
    if config.prune.target_depth is None:
        found.append("`prune.target_depth` is missing: the blocks that stay, e.g. target_depth=4.")
    return found or _study_problems(config)


def _study_problems(config: Config) -> list[str]:
    """What a study needs; all values are possible by themselves."""
    compare, found = config.compare, []
    if "subsets" in compare.study:
        if compare.long_steps <= compare.recovery_steps:
            message = f"`compare.long_steps` must be above `compare.recovery_steps` ({compare.recovery_steps}), "
            found.append(message + f"got {compare.long_steps}.")
        if not compare.probe_steps or max(compare.probe_steps) > compare.recovery_steps:
            message = f"`compare.probe_steps` must be steps up to `compare.recovery_steps` ({compare.recovery_steps}), "
            found.append(message + f"got {list(compare.probe_steps)}.")
    if "schedule" in compare.study and not compare.num_checks <= compare.phase * compare.recovery_steps:
        message = f"`compare.phase` of `compare.recovery_steps` must hold at least {compare.num_checks} steps "
        found.append(message + f"(`compare.num_checks`), got {compare.phase} of {compare.recovery_steps}.")
    if not 0 < compare.phase <= 1:
        found.append(f"`compare.phase` must lie in (0, 1], got {compare.phase}.")
    if compare.bases and (min(compare.bases) < 0 or compare.seeds[0] in compare.bases):
        message = f"`compare.bases` must be seeds of at least 0 other than {compare.seeds[0]}, the common base's, "
        found.append(message + f"got {list(compare.bases)}.")
    for study, key in (
        ("estimators", "estimators"), ("distill", "recoveries"), ("depth", "depths"), ("bases", "bases")
    ):  # fmt: skip
        if study in compare.study and not getattr(compare, key):
            found.append(f"`compare.{key}` is empty, but `compare.study` asks for {study}. Name what to compare.")
    if "sampling" in compare.study and "criteria" not in compare.study:
        found.append("`compare.study`: sampling samples the rows of criteria. Add criteria.")
    if "subsets" in compare.study and "criteria" not in compare.study:
        found.append("`compare.study`: subsets are compared with the rows of criteria. Add criteria.")
    subsets = "subsets" in compare.study
    if (compare.equal_compute or subsets) and config.train.lr_schedule != "constant":
        message = "`train.lr_schedule` must be constant: rows are measured in the middle of their training, got "
        remedy = "compare.equal_compute=false" + (" and no subsets in compare.study" if subsets else "")
        found.append(f"{message}{config.train.lr_schedule}. Set it, or {remedy}.")
    if subsets and config.distill.kind == "features":
        message = "`distill.kind` features fades out over a training, but `compare.study` subsets goes on after it. "
        found.append(message + "Set distill.kind=output, or take subsets out.")
    return found + _name_problems(criteria_of(config))


def _name_problems(criteria: Sequence[str]) -> list[str]:
    """Files of criteria that would share a row with another one."""
    stems = [Path(criterion).stem for criterion in criteria]
    same = [c for c in criteria if c.endswith(".py") and (stems.count(Path(c).stem) > 1 or Path(c).stem in CRITERIA)]
    message = f"`compare.criteria`: {', '.join(same)} would be called like another criterion, whose rows they share. "
    return [message + "Rename the files."] if same else []
