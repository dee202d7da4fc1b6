"""What the rows in a folder of `entprune-ds compare` were made from, so that none of another experiment joins them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from entprune_ds.atomic import file_sha256
from entprune_ds.cli.compare_base import OTHERS, base_path, further_base, other_base
from entprune_ds.cli.compare_plan import Row, row_config, row_digest, row_values, rows_of, studies
from entprune_ds.cli.compare_row import has_figures, read_result, result_path
from entprune_ds.config import Config, ModelConfig, config_from_dict
from entprune_ds.data.index import load_index

OF_A_LEG = ("train.num_steps", "train.stop_step", "train.validate_every")
"""Settings that a row changes while it trains."""


def other_settings(config: Config, model: ModelConfig) -> list[str]:
    """Why this command cannot go on in its folder: rows or a base that were made with other settings or from others."""
    found, out = other_base(config), Path(config.compare.out)
    batches = [str(batch) for batch in config.evaluate.latency_batches]
    for row in [] if found else rows_of(studies(config, model)):
        result = read_result(out, row.name)
        if not has_figures(result):
            continue
        settings = row_config(config, row, model, out)
        what = [] if result["digest"] == row_digest(settings) else [f"with other settings{_which(settings)}"]
        now = sources(config, row)
        different = [key for key, value in result.get("sources", {}).items() if now.get(key, value) != value]
        what += [f"from {'another base' if key == 'base' else 'other data'}" for key in different]
        what += ["with other `evaluate.latency_batches`"] if list(result.get("latency_ms", batches)) != batches else []
        if what:
            path = result_path(out, row.name)
            return [f"`compare.out`: {path} was made {' and '.join(what)} than these. {OTHERS}"]
    return found


def _which(settings: Config) -> str:
    """Settings of a row that its run folder has otherwise, in brackets; empty where the folder does not say."""
    try:
        stored = config_from_dict(yaml.safe_load((settings.run_dir / "config.yaml").read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    then, now = (_flat(row_values(c)) for c in (stored, settings))
    keys = [key for key in now if key not in OF_A_LEG and key in then and then[key] != now[key]]
    return f" ({'; '.join(f'`{key}` {then[key]}, not {now[key]}' for key in keys)})" if keys else ""


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{s}.{key}": value for s, part in values.items() if isinstance(part, dict) for key, value in part.items()}


def sources(config: Config, row: Row) -> dict[str, str]:
    """Digests of the base and of the training data of a row, as far as they are there."""
    found = {"data": load_index(config.data.shards, config.data.allow_pipe).digest} if config.data.shards else {}
    base = base_path(config) if row.base is None else further_base(Path(config.compare.out), row.base)
    return found | ({"base": _content(base)} if base.exists() else {})


@cache
def _content(path: Path) -> str:
    """Digest of a model: of a file, or of the weights and descriptions in a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json", ".pt", ".pth", ".bin"))
    return hashlib.sha256("".join(file_sha256(p) for p in files).encode()).hexdigest()
