"""Settings of a run, merged as defaults <- preset YAML <- key=value; all problems are reported at once.

No torch is imported, so `--help` answers immediately.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entprune_ds.config_checks import model_problems, problems_of
from entprune_ds.config_methods import METHODS
from entprune_ds.config_schema import (
    NOT_ARCHITECTURE,
    CompareConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    DistillConfig,
    EvalConfig,
    LearnedConfig,
    ModelConfig,
    MonitorConfig,
    ParallelConfig,
    PruneConfig,
    RaceConfig,
    ResizeConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    SoftConfig,
    TrainConfig,
)
from entprune_ds.config_values import ConfigError, config_from_dict, digest, to_dict, to_stored, to_yaml
from entprune_ds.plain_yaml import read_yaml

__all__ = [
    "METHODS",
    "NOT_ARCHITECTURE",
    "PRESETS",
    "CompareConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "DistillConfig",
    "EvalConfig",
    "LearnedConfig",
    "ModelConfig",
    "MonitorConfig",
    "ParallelConfig",
    "PruneConfig",
    "RaceConfig",
    "ResizeConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "SoftConfig",
    "TrainConfig",
    "config_from_dict",
    "digest",
    "load_config",
    "model_problems",
    "problems_of",
    "to_dict",
    "to_stored",
    "to_yaml",
]

PRESETS = Path(__file__).parent / "presets"
YAML = (".yaml", ".yml")
MOST_BASES = 8
"""Presets that one may rest on, each by its `base`."""


def load_config(arguments: list[str], check: typing.Callable[[Config], list[str]] | None = None) -> Config:
    """Merge defaults, `preset=NAME` and `key=value` arguments into a checked Config.

    `prune.method` stands for what METHODS says: above the preset and below the other arguments. Where the preset
    itself names a method, as the config.yaml of a run may, the rest of the preset counts more.

    Args:
        arguments: command-line words, each `key=value`; `preset` names a packaged preset or a file.
        check: further problems to look for; defaults to `problems_of`.

    Raises:
        ConfigError: listing every unknown key, bad value and impossible combination.
    """
    problems: list[str] = []
    preset, layers = "", []
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"`{word}` is not of the form key=value. See --help.")
        elif key == "preset":
            preset = text
        else:
            layers.append(_layer(key, text, problems))
    values = _read_preset(preset, problems)
    file = _criterion_of(values)
    if file.endswith(".py") and not any(map(_criterion_of, layers)):
        message = (
            f"preset `{preset}` sets `prune.criterion` to a file, whose code would run. Take it out; who wants it "
        )
        problems.append(message + f"writes prune.criterion={file} on the command line.")
    layers = [_method_of([values]), values, _method_of(layers), *layers]
    interpolations = [p for layer in layers for p in _interpolations(layer)]
    problems += interpolations
    config = config_from_dict({} if interpolations else _merge(layers, problems), problems)
    if not problems:
        try:
            problems = (check or problems_of)(config)
        except OSError as error:  # a path that the system refuses even to look at
            what = f"{error.strerror}: {str(error.filename)[:100]}"
            problems = [f"a path among the settings cannot be looked at ({what}). Correct it, or its permissions."]
    if problems:
        raise ConfigError(problems)
    return config


def _method_of(layers: list[dict]) -> dict:
    """What the last `prune.method` stands for; empty where there is none, or one that is refused later."""
    sections = [layer["prune"] for layer in layers if isinstance(layer.get("prune"), dict)]
    methods = [prune["method"] for prune in sections if "method" in prune]
    return METHODS.get(str(methods[-1]), {}) if methods else {}


def _layer(key: str, text: str, problems: list[str]) -> dict:
    """`section.name=text` as nested values; text stays as written where the setting is text."""
    section, dot, name = key.partition(".")
    if "." in name:
        problems.append(f"`{key}` is not a setting. Settings are SECTION.NAME, see --help.")
        return {}
    if not dot:
        return {section: _yaml_value(text)}
    cls = typing.get_type_hints(Config).get(section)
    hint = typing.get_type_hints(cls).get(name) if cls else None
    return {section: {name: text if hint is str else _yaml_value(text)}}


def _yaml_value(text: str) -> Any:
    """A YAML value, or the text itself where it is none (or refers to itself)."""
    try:
        value = read_yaml(text)
        json.dumps(value)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    return value


def _read_preset(name: str, problems: list[str]) -> dict:
    """The settings of a preset, over those of the preset that its `base` names."""
    values: dict = {}
    seen: list[str] = []
    while name:
        seen.append(name)
        if name in seen[:-1] or len(seen) > MOST_BASES:
            chain = " -> ".join(seen)
            problems.append(
                f"preset `{seen[0]}` has a `base` that leads back to it, or too many: {chain}. Take one out."
            )
            return {}
        here = _read_one_preset(name, problems)
        base = here.pop("base", "")
        if not isinstance(base, str):
            problems.append(f"preset `{name}`: `base` must name a preset, got {base!r}.")
            return {}
        values = _over(here, values)
        name = str(Path(name).parent / base) if base.endswith(YAML) and name.endswith(YAML) else base
    return values


def _over(below: dict, above: dict) -> dict:
    """Settings over others, section by section."""
    merged = {**below, **above}
    for section, values in above.items():
        if isinstance(values, dict) and isinstance(below.get(section), dict):
            merged[section] = {**below[section], **values}
    return merged


def _read_one_preset(name: str, problems: list[str]) -> dict:
    path = Path(name) if name.endswith(YAML) else PRESETS / f"{name}.yaml"
    try:
        values = read_yaml(path.read_text())
        json.dumps(values)
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        problems.append(f"preset `{name}` {why}. Choose one of {known}, or give a .yaml file.")
        return {}
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        problems.append(f"preset `{name}` is not plain YAML: {' '.join(str(error).split())}.")
        return {}
    if not isinstance(values, dict | None):
        problems.append(f"preset `{name}` must hold sections of settings, such as `model:`.")
        return {}
    data = (values or {}).get("data")
    if isinstance(data, dict) and data.get("allow_pipe", False) is not False:
        message = f"preset `{name}` sets `data.allow_pipe`, which lets shards run shell commands. "
        problems.append(message + "Take it out; who wants it writes data.allow_pipe=true on the command line.")
    return values or {}


def _criterion_of(layer: dict) -> str:
    """What a layer says about `prune.criterion`; empty where it says nothing."""
    prune = layer.get("prune")
    return str(prune.get("criterion", "")) if isinstance(prune, dict) else ""


def _merge(layers: list[dict], problems: list[str]) -> dict:
    """Later layers win. The values hold no interpolations: they were refused before."""
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        problems.append(f"the settings cannot be combined: {str(error).splitlines()[0]}")
        return {}
    return typing.cast(dict, merged)


def _interpolations(values: Any, path: str = "") -> list[str]:
    """Refuse `${...}`: resolvers could read the environment, and a config must say what it means."""
    if isinstance(values, dict):
        return [p for k, v in values.items() for p in _interpolations(v, f"{path}.{k}" if path else str(k))]
    if isinstance(values, list):
        return [p for v in values for p in _interpolations(v, path)]
    if isinstance(values, str) and "${" in values:
        return [f"`{path}` contains an interpolation (`${{`). Interpolations are disabled: write the value itself."]
    return []
