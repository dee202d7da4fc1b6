"""One row of a comparison: trained by the ordinary trainer up to each of its stops, and measured there."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from entprune_ds import comm
from entprune_ds.atomic import write_text
from entprune_ds.cli.compare_metrics import VALIDATION, check_seconds, damage, equal_step, spent, validation_losses
from entprune_ds.cli.compare_plan import Row, removals, row_config, row_digest
from entprune_ds.cli.evaluate import latency, real_images
from entprune_ds.cli.sample import draw
from entprune_ds.config import CompareConfig, Config, ModelConfig
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.engine.checkpoint import step_folders
from entprune_ds.evaluation.fid import evaluate_samples
from entprune_ds.evaluation.memorisation import memorisation
from entprune_ds.interop.source import loaded_model
from entprune_ds.interop.weights import open_weights
from entprune_ds.mac_counter import MacCounter
from entprune_ds.models.dit import DiT
from entprune_ds.models.registry import count_macs
from entprune_ds.monitor.files import read_json_lines
from entprune_ds.trainer import train


@dataclass(frozen=True)
class Bench:
    """What all rows of a worker share."""

    config: Config
    """Of the command."""
    out: Path
    model: ModelConfig
    """Architecture of the base; its weights are the base."""
    training: np.ndarray
    """Training images, uint8 (N,H,W,C)."""
    validation: np.ndarray
    """Images of the validation split."""
    extractor: Any


def open_bench(config: Config, out: Path, base: Path) -> Bench:
    """Read the base's architecture and the real images. The extractor is trained once per folder."""
    model = replace(open_weights(base, assumed=config.model).model, weights=str(base))
    training, validation, extractor, _ = real_images(config, out)
    return Bench(config, out, model, training, validation, extractor)


def result_path(out: Path, name: str) -> Path:
    """Where the result of a row lies."""
    return out / "results" / f"{name}.json"


def read_result(out: Path, name: str) -> dict[str, Any]:
    """What is known of a row so far; empty if nothing."""
    path = result_path(out, name)
    return json.loads(path.read_text()) if path.is_file() else {}


def missing(row: Row, compare: CompareConfig, result: dict[str, Any]) -> list[str]:
    """What a row's result lacks, in words; empty for a finished row."""
    stops = [compare.recovery_steps, *([compare.long_steps] if row.long else [])]
    stops += [result["equal_step"]] if "equal_step" in result else []
    found = [f"step {stop}" for stop in stops if str(stop) not in result.get("stops", {})]
    found += ["equal compute"] if compare.equal_compute and "equal_step" not in result else []
    found += [f"probe {s}" for s in row.probes if str(s) not in result.get("probes", {})]
    found += [f"{s} sampler steps" for s in row.samplings if str(s) not in result.get("samplings", {})]
    return found + (["latency"] if "latency_ms" not in result else [])


def has_figures(result: dict[str, Any]) -> bool:
    """Whether anything was measured of a row."""
    return bool(result.get("stops"))


def run_row(bench: Bench, row: Row, sources: dict[str, str]) -> None:
    """Train and measure what is still missing of a row; its result file grows with every figure.

    Args:
        sources: digests of what it is made from, for its result.
    """
    config, compare = bench.config, bench.config.compare
    settings, path = row_config(config, row, bench.model, bench.out), result_path(bench.out, row.name)
    made: dict[str, Any] = {"digest": row_digest(settings), "sources": sources}
    result = read_result(bench.out, row.name)
    if any(result.get(key) != value for key, value in made.items()) and not has_figures(result):
        shutil.rmtree(settings.run_dir, ignore_errors=True)  # what lies there was begun with other settings
        result = made | {"row": asdict(row), "seconds": 0.0}
    result |= {k: result.get(k, {}) for k in ("stops", "probes", "samplings")}
    begin, before = time.monotonic(), result["seconds"]
    late = [step for step in row.probes if str(step) not in result["probes"]]
    if late and any(int(stop) >= min(late) for stop in result["stops"]):  # trained without these probes: once more
        result["stops"] = {}
        shutil.rmtree(settings.run_dir, ignore_errors=True)

    def save() -> None:
        memory = psutil.Process().memory_info().rss >> 20
        result.update(seconds=before + time.monotonic() - begin, worker_mib=memory)
        write_text(path, json.dumps(result, indent=2, allow_nan=False))

    path.parent.mkdir(exist_ok=True)
    save()  # first of all: it says what the run folder is made from
    stops = {compare.recovery_steps, *([compare.long_steps] if row.long else [])}
    if compare.equal_compute:
        if "equal_step" not in result:
            first = removals(settings)[-1] + 1
            train_to(settings, row, first)
            budget = compare.recovery_steps * plain_step_macs(settings, bench.model, row.target_depth)
            result |= {"macs_budget": budget, "equal_step": equal_step(metrics_of(settings), budget)}
            save()
        stops.add(result["equal_step"])
    for stop in sorted(stops):
        if str(stop) not in result["stops"]:
            train_to(settings, row, stop)
            result |= facts(settings, row)
            result["probes"] |= validation_losses(metrics_of(settings), row.probes)
            result["stops"][str(stop)] = measure(bench, settings, keep_model(settings, stop), stop)
            save()
    main = result["equal_step"] if compare.equal_compute else compare.recovery_steps
    model = settings.run_dir / f"model_{main}"
    for steps in row.samplings:
        if str(steps) not in result["samplings"]:
            sampled = replace(settings, sample=replace(settings.sample, num_steps=steps))
            result["samplings"][str(steps)] = quality(bench, sampled, model)
            save()
    if "latency_ms" not in result:
        result |= speed(bench, settings, model)
    save()
    shutil.rmtree(settings.run_dir / "checkpoints", ignore_errors=True)
    for other in stops - {main}:
        shutil.rmtree(settings.run_dir / f"model_{other}", ignore_errors=True)


def _base_samplings(config: Config) -> tuple[int, ...]:
    return config.compare.sampling_steps if "sampling" in config.compare.study else ()


def base_unfinished(config: Config, result: dict[str, Any]) -> bool:
    """Whether something about the base is still to be measured."""
    return "latency_ms" not in result or any(str(s) not in result["samplings"] for s in _base_samplings(config))


def run_base(bench: Bench) -> None:
    """Measure the base, as the row that the others are read against."""
    config, path = bench.config, result_path(bench.out, "base")
    base, samplings = Path(bench.model.weights), _base_samplings(config)
    result = read_result(bench.out, "base") or quality(bench, config, base) | {"samplings": {}}
    path.parent.mkdir(exist_ok=True)
    for steps in samplings:
        if str(steps) not in result["samplings"]:
            sampled = replace(config, sample=replace(config.sample, num_steps=steps))
            result["samplings"][str(steps)] = quality(bench, sampled, base)
    if "latency_ms" not in result:
        result |= speed(bench, config, base)
    result |= {"depth": len(bench.model.blocks), "macs_forward": count_macs(bench.model)}
    write_text(path, json.dumps(result, indent=2, allow_nan=False))


def train_to(settings: Config, row: Row, stop: int) -> None:
    """Train on to a step, over the ordinary path; from the start again where the newest checkpoint is beyond it.

    Up to the last probe there is a validation at every probe; beyond it only at the stops.
    """
    here = max((int(f.name.removeprefix("step_")) for f in step_folders(settings.run_dir / "checkpoints")), default=0)
    if here > stop:
        shutil.rmtree(settings.run_dir)
        here = 0
    last_probe = max(row.probes, default=0)
    legs = [stop] if not here < last_probe < stop else [last_probe, stop]
    for leg in legs:
        every = math.gcd(*row.probes) if leg <= last_probe else 10**9
        steps = max(settings.train.num_steps, stop)
        schedule = replace(settings.train, num_steps=steps, stop_step=leg, validate_every=every)
        train(replace(settings, train=schedule), [])


def keep_model(settings: Config, stop: int) -> Path:
    """Keep the export of a stop under its own name.

    Raises:
        ValueError: when the training has ended at another step.
    """
    kept, made = settings.run_dir / f"model_{stop}", settings.run_dir / "model"
    step = open_weights(made, assumed=settings.model).facts["step"]
    if step != stop:
        raise ValueError(f"{made} is of step {step}, not {stop}: another process trains in this folder. Run again.")
    shutil.rmtree(kept, ignore_errors=True)
    return made.rename(kept)


def plain_step_macs(settings: Config, model: ModelConfig, depth: int) -> int:
    """Multiply-accumulates of a training step without a teacher, counted: forward and backward of one batch."""
    import torch

    shallow = model.keeping(model.blocks[:depth])
    objective, net = build_objective(shallow, settings.diffusion), DiT(shallow)
    latents = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
    draws = objective.make_draws(latents, torch.tensor([0]), [0], seed=0, purpose="macs", step=0)
    with MacCounter() as counter:
        objective.loss(net(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean().backward()
    return counter.macs * settings.train.global_batch_size


def metrics_of(settings: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those that a resume has left behind."""
    return read_json_lines(settings.run_dir / "metrics.jsonl").rows


def facts(settings: Config, row: Row) -> dict[str, Any]:
    """What the checks decided and what it took: blocks, damage, seconds."""
    metrics = metrics_of(settings)
    decisions = read_json_lines(settings.run_dir / "decisions.jsonl").rows
    return {
        "kept_blocks": decisions[-1]["kept_blocks"],
        "depths": [d["chosen_depth"] for d in decisions],
        "damage": damage([d["step"] for d in decisions if d["dropped"] or d.get("narrow")], metrics),
        "score_seconds": check_seconds(metrics),
    }


def measure(bench: Bench, settings: Config, model: Path, stop: int) -> dict[str, Any]:
    """All figures of a row at a step."""
    metrics = metrics_of(settings)
    training, scoring = spent(metrics, stop)
    loss = next(line[f"{VALIDATION}_ema"] for line in reversed(metrics) if f"{VALIDATION}_ema" in line)
    cost = {"steps": stop, "macs": training + scoring, "macs_training": training, "macs_scoring": scoring}
    return quality(bench, settings, model) | {"val_loss": loss} | cost


def quality(bench: Bench, settings: Config, model: Path) -> dict[str, Any]:
    """FID, KID, class accuracy and memorisation of samples of a model."""
    images, labels, _ = draw(settings, model)
    whole = np.concatenate([bench.training, bench.validation])
    found = evaluate_samples(images, labels, {"whole": whole}, bench.extractor)
    return found | {"memorisation": memorisation(images, bench.training, bench.validation)}


def speed(bench: Bench, settings: Config, model: Path) -> dict[str, Any]:
    """Latency of a forward pass, and the speed-up over the base, measured in turn with it."""
    result: dict[str, Any] = {"pruned": {}, "base": {}}
    result |= latency(settings, {"base": Path(bench.model.weights), "pruned": model}, result)
    return {"latency_ms": result["pruned"]["latency_ms"], "speedup": result["speedup"]}


def subset_scores(bench: Bench, keep_sets: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Scores that keep-sets have without any training: {set: {score: value}}.

    Sums of the leave-one-out scores of the blocks that go, and the same scores of all of them going together.
    """
    from entprune_ds.cli.compare_scores import score_sets

    net = loaded_model(open_weights(Path(bench.model.weights), assumed=bench.config.model)).to(comm.device())
    return score_sets(replace(bench.config, model=bench.model), net, keep_sets)
