"""`entprune-ds evaluate`: FID, KID, class accuracy and latency of a model, and of the baseline beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entprune_ds.cli.common import help_text, refuse, split_shortcuts, wants_help, with_run
from entprune_ds.cli.sample import draw, protocol_path, sampling_problems
from entprune_ds.config import Config, ConfigError, load_config, problems_of
from entprune_ds.plain_json import parse_json

if TYPE_CHECKING:
    from entprune_ds.data.index import Index

HELP = """\
Measure an exported model: FID and KID (clean-fid's functions) against the whole data set and the validation split,
class accuracy of the samples, and the latency of a forward pass, interleaved with that of a baseline: the speed-up is
the median of the ratios of neighbouring measurements, with their interquartile range.

  entprune-ds evaluate run=runs/demo evaluate.baseline=runs/demo_base/model
  entprune-ds evaluate weights=demo_model data.shards=data_digits/train out=figures.json

The feature extractor is built in and made for digits (1x8x8, 10 classes): a small CNN trained on the training split
in seconds; its test accuracy is printed. Every figure is stored with the protocol it depends on.
"""
SECTIONS = ["evaluate", "sample", "data"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status (0 done, 2 refused)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        words, folder = with_run(
            split_shortcuts(words, {"out": "evaluate.out", "weights": "model.weights"}), "evaluate"
        )
        config = load_config(words, check=_problems)
        out = Path(config.evaluate.out or (folder / "evaluation.json" if folder else "evaluation.json"))
        result = evaluate(config, cache=out.parent)
        out.write_text(json.dumps(result, indent=2, allow_nan=False))
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])
    show(result)
    print(f"figures: {out}")
    if folder is not None and config.monitor.wandb:
        log_figures(config, folder, result)
    return 0


def _problems(config: Config) -> list[str]:
    from entprune_ds.preflight import validation_spec

    found, evaluate = [], config.evaluate
    if not config.model.weights:
        found += problems_of(config)
        found.append("`model.weights` is missing: give an exported model, weights=DIR or run=RUNS/NAME.")
    if not config.data.shards:
        found.append("`data.shards` is missing: it is the reference, e.g. data.shards=data_digits/train.")
    elif not validation_spec(config):
        found.append("`data.val_shards` is missing, and there is no folder `val` beside `data.shards`.")
    for key, folder in (("model.weights", config.model.weights), ("evaluate.baseline", evaluate.baseline)):
        if folder:
            found += [p for p in sampling_problems(config, Path(folder), key) if p not in found]
    for key in ("samples", "baseline_samples"):
        path = Path(getattr(evaluate, key))
        if getattr(evaluate, key) and not (path.is_file() and protocol_path(path).is_file()):
            found.append(
                f"`evaluate.{key}`: {path} or its {protocol_path(path).name} is missing. Run `entprune-ds sample`."
            )
    return found


def evaluate(config: Config, cache: Path) -> dict[str, Any]:
    """All figures as plain values (evaluation.json).

    Raises:
        ValueError: when the data is not digits, or samples and data do not fit.
    """
    images, val_images, extractor, folder = real_images(config, cache)
    references = {"whole": np.concatenate([images, val_images]), "validation": val_images}
    models = {"pruned": (config.model.weights, config.evaluate.samples)}
    if config.evaluate.baseline:
        models = {"base": (config.evaluate.baseline, config.evaluate.baseline_samples)} | models
    result: dict[str, Any] = {}
    protocols = []
    for name, (weights, samples) in models.items():
        result[name], found = figures(config, Path(weights), samples, references, extractor)
        protocols.append({k: v for k, v in found.items() if k not in ("depth", "kept_blocks", "step", "model")})
    protocol = protocols[-1]
    different = [k for k in protocol if protocols[0].get(k) != protocol[k]]
    if different:
        message = f"the two sets of samples differ in {', '.join(different)}, so their figures cannot be compared. "
        raise ValueError(message + "Draw both with the same settings.")
    result |= latency(config, {name: Path(weights) for name, (weights, _) in models.items()}, result)
    result["protocol"] = protocol | {
        "reference": f"{len(references['whole'])} images, of which {len(val_images)} validation: {folder.parent}",
        "extractor": extractor.name,
        "extractor_test_accuracy": extractor.test_accuracy,
    }
    return result


def extractor_problem(index: Index) -> str:
    """Why the built-in extractor says nothing about some data; empty where it does."""
    if tuple(index.shape) == (1, 8, 8) and index.num_classes == 10:
        return ""
    message = f"the built-in extractor is made for digits (1x8x8, 10 classes), {index.folder} holds "
    return message + f"{list(index.shape)} with {index.num_classes} classes."


def real_images(config: Config, cache: Path) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Training and validation images, uint8 (N,H,W,C), the extractor made from them, and the folder of the shards.

    Raises:
        ValueError: when the data is not digits.
    """
    from entprune_ds.data.index import load_index
    from entprune_ds.data.stream import read_all
    from entprune_ds.evaluation.features import load_or_train
    from entprune_ds.evaluation.images import to_uint8
    from entprune_ds.preflight import validation_spec

    pipe = config.data.allow_pipe
    index = load_index(config.data.shards, pipe)
    if problem := extractor_problem(index):
        raise ValueError(problem)
    (train, train_labels), (val, val_labels) = read_all(index), read_all(validation_spec(config), pipe)
    images, val_images = to_uint8(train), to_uint8(val)
    extractor = load_or_train(images, train_labels.numpy(), val_images, val_labels.numpy(), cache=cache)
    return images, val_images, extractor, index.folder


def figures(config: Config, weights: Path, samples: str, references: dict, extractor: Any) -> tuple[dict, dict]:
    """Sample figures of one model, and the protocol of its samples."""
    from entprune_ds.evaluation.fid import evaluate_samples
    from entprune_ds.evaluation.images import load_npz
    from entprune_ds.interop.weights import open_weights
    from entprune_ds.models.registry import count_parameters

    if samples:
        (images, labels), protocol = load_npz(samples), parse_json(protocol_path(Path(samples)).read_text())
    else:
        images, labels, protocol = draw(config, weights)
    source = open_weights(weights, assumed=config.model)
    model, step, kept = source.model, source.facts["step"], list(source.model.blocks)
    if (protocol["step"], protocol["kept_blocks"]) != (step, kept):
        drawn = f"{samples} was drawn from blocks {protocol['kept_blocks']} at step {protocol['step']}"
        held = f"{weights} holds {kept} at step {step}"
        raise ValueError(f"{drawn}, but {held}. Run `entprune-ds sample` again.")
    size = {"depth": len(model.blocks), "original_depth": model.depth, "kept_blocks": kept}
    size |= {"parameters": count_parameters(model), "step": step}
    return size | evaluate_samples(images, labels, references, extractor), protocol


def latency(config: Config, weights: dict[str, Path], result: dict[str, Any]) -> dict[str, Any]:
    """Median latency per model (put into `result`); the speed-up as median and quartiles of paired ratios."""
    from entprune_ds import comm
    from entprune_ds.evaluation.latency import measure_latency, speedup, speedup_spread
    from entprune_ds.interop.source import loaded_model
    from entprune_ds.interop.weights import opened

    sources = {name: opened(folder, config.model) for name, folder in weights.items()}
    models: dict[str, Any] = {name: loaded_model(source).to(comm.device()) for name, source in sources.items()}
    m = sources["pruned"].model
    measured = measure_latency(
        models, batch_sizes=config.evaluate.latency_batches, shape=(m.in_channels, m.input_size, m.input_size),
        num_classes=m.num_classes, repeats=config.evaluate.latency_repeats, device=comm.device(),
    )  # fmt: skip
    for name, by_batch in measured.items():
        result[name]["latency_ms"] = {str(b): v["median_ms"] for b, v in by_batch.items()}
    if "base" not in measured:
        return {}
    return {
        "speedup": {str(b): ratio for b, ratio in speedup(measured, "base", "pruned").items()},
        "speedup_iqr": {str(b): quartiles for b, quartiles in speedup_spread(measured, "base", "pruned").items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['protocol']['num_samples']} samples, {result['protocol']['reference']}")
    for column in ("model", "depth", "parameters", "FID", "FID val", "KID x 1000", "class accuracy"):
        table.add_column(column)
    batches = list(next(iter(result.values()))["latency_ms"])
    for batch in batches:
        table.add_column(f"ms, batch {batch}")
    for name in (n for n in ("base", "pruned") if n in result):
        r = result[name]
        row = [name, str(r["depth"]), f"{r['parameters']:,}", f"{r['fid']:.2f}", f"{r['fid_validation']:.2f}"]
        row += [f"{1000 * r['kid']:.2f}", f"{r['class_accuracy']:.4f}", *(f"{r['latency_ms'][b]:.2f}" for b in batches)]
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if "speedup" in result:
        spread = {b: f"{iqr['q25']:.2f} to {iqr['q75']:.2f}" for b, iqr in result["speedup_iqr"].items()}
        shown = ", ".join(f"{v:.2f}x ({spread[b]}) at batch {b}" for b, v in result["speedup"].items())
        console.print(f"measured speed-up, median (interquartile range) of paired repeats: {shown}")
    accuracy = result["protocol"]["extractor_test_accuracy"]
    console.print(f"extractor: {result['protocol']['extractor']}, test accuracy {accuracy:.4f}")


def log_figures(config: Config, folder: Path, result: dict[str, Any]) -> None:
    """Add the figures to the W&B run of the training, if it had one."""
    from entprune_ds.monitor.metrics import open_monitor

    if (folder / "wandb_id.txt").is_file():
        monitor = open_monitor(config, folder, enabled=True)
        monitor.summary({f"eval/{k}": v for k, v in result.items()})
        monitor.finish()


if __name__ == "__main__":
    sys.exit(main())
