"""`entprune-ds evaluate`: FID and its kin, and latency, of a model and of the baseline beside it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from entprune_ds.cli.common import help_text, launched_words, leave, refuse, split_shortcuts, wants_help, with_run
from entprune_ds.cli.sample import protocol_path, sampling_problems
from entprune_ds.config import Config, ConfigError, config_from_dict, load_config, problems_of
from entprune_ds.launcher import launch_problems
from entprune_ds.plain_yaml import read_yaml

HELP = """\
Measure an exported model: FID, KID (clean-fid's function), sFID, Inception score, precision and recall of its samples
against real images, class accuracy where the extractor knows the classes, and the latency of a forward pass,
interleaved with that of a baseline: the speed-up is the median of the ratios of neighbouring measurements, with their
interquartile range. Every figure is stored and printed with what it depends on.

  entprune-ds evaluate run=runs/demo evaluate.baseline=runs/demo_base/model
  entprune-ds evaluate weights=demo_model data.shards=data_digits/train out=figures.json
  torchrun --nproc_per_node 8 -m entprune_ds.cli.evaluate weights=xl out=xl.json evaluate.extractor=inception \
      evaluate.reference=VIRTUAL_imagenet256_labeled.npz sample.num_samples=50000 ...     (the papers' protocol)
  entprune-ds evaluate ... evaluate.save_reference=cub.npz          keeps the statistics of data.shards for later

The extractor `digits` is a small CNN for 1x8x8 digits, trained on the training split in seconds, its test accuracy
printed. `inception` is the network of the papers; its weights come from evaluate.inception=FILE, or are downloaded once
per node. Samples are drawn here unless evaluate.samples names them; drawing goes on after a kill. All ranks draw and
look at images; rank 0 computes the figures.
"""
SECTIONS = ["evaluate", "sample", "data"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed on the way, 2 refused."""
    words, _ = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        words, folder = with_run(
            split_shortcuts(words, {"out": "evaluate.out", "weights": "model.weights"}), "evaluate"
        )
        config = load_config(words, check=_problems)
        out = Path(config.evaluate.out or (folder / "evaluation.json" if folder else "evaluation.json"))
        blocked = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
        if out.is_dir() or blocked is not None:
            return refuse([f"`out`: {out if blocked is None else blocked} is in the way. Give a path of a JSON file."])
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:  # a name too long, or a folder that is closed
        return refuse([str(error)])
    from entprune_ds.cli.launched import run_launched

    return run_launched(lambda: run(config, out, folder), config.run.timeout_seconds)


def run(config: Config, out: Path, folder: Path | None) -> None:
    """Measure, write and print. All ranks call."""
    from entprune_ds.atomic import write_text

    out.parent.mkdir(parents=True, exist_ok=True)
    result = evaluate(config, cache=out.parent)
    if result is None:
        return
    write_text(out, json.dumps(result, indent=2, allow_nan=False))
    for parts in out.parent.glob("samples_*.parts"):  # those of this evaluation: their figures are safe now
        if parts.name in result["protocol"]["drawn"]:
            shutil.rmtree(parts)
    show(result)
    print(f"figures: {out}")
    if config.evaluate.latency_table:
        from entprune_ds.cli.latency_table import markdown

        table = out.with_name(f"{out.stem}_latency.md")
        write_text(table, markdown(result["latency_table"]))
        print(f"latency: {table}")
    if folder is not None and config.monitor.wandb:
        log_figures(folder, result)


def _problems(config: Config) -> list[str]:
    from entprune_ds.cli.latency_table import table_problems
    from entprune_ds.preflight import validation_spec

    found, evaluate = launch_problems() + table_problems(config), config.evaluate
    if not config.model.weights:
        found += problems_of(config)
        found.append("`model.weights` is missing: give an exported model, weights=DIR or run=RUNS/NAME.")
    if evaluate.extractor == "digits" or not evaluate.reference:
        if not config.data.shards:
            message = "`data.shards` is missing: it is the reference, e.g. data.shards=data_digits/train. "
            found.append(message + "Or give statistics, evaluate.reference=FILE.npz.")
        elif evaluate.extractor == "digits" and not validation_spec(config):
            found.append("`data.val_shards` is missing, and there is no folder `val` beside `data.shards`.")
    save = Path(evaluate.save_reference)
    if evaluate.save_reference and (save.suffix != ".npz" or save.is_dir()):
        found.append(f"`evaluate.save_reference` must be a path ending in .npz, got {save}.")
    for key in ("reference", "extractor", "inception"):
        value = getattr(evaluate, key)
        if value and value not in ("digits", "inception") and not Path(value).exists():
            found.append(f"`evaluate.{key}`: {value} does not exist.")
    for key, folder in (("model.weights", config.model.weights), ("evaluate.baseline", evaluate.baseline)):
        if folder:
            found += [p for p in sampling_problems(config, Path(folder), key) if p not in found]
    for key in ("samples", "baseline_samples"):
        path = Path(getattr(evaluate, key))
        if getattr(evaluate, key) and not (path.exists() and protocol_path(path).is_file()):
            found.append(
                f"`evaluate.{key}`: {path} or its {protocol_path(path).name} is missing. Run `entprune-ds sample`."
            )
    return found


def evaluate(config: Config, cache: Path) -> dict[str, Any] | None:
    """All figures as plain values (evaluation.json) on rank 0, None on the others. Collective.

    Args:
        cache: folder for the digits extractor and for samples that are being drawn; all ranks must see it.

    Raises:
        ValueError: when extractor, reference and samples do not fit; before anything is drawn.
    """
    from entprune_ds import comm
    from entprune_ds.cli.drawing import OF_THE_MODEL
    from entprune_ds.cli.evaluate_candidates import choose_metrics, look, open_candidate
    from entprune_ds.cli.evaluate_inputs import open_bench
    from entprune_ds.cli.latency_table import check_depths, measure_table
    from entprune_ds.evaluation.figures import figures
    from entprune_ds.evaluation.references import save_reference

    settings, bench = config.evaluate, open_bench(config, cache)
    models = {"pruned": (config.model.weights, settings.samples)}
    if settings.baseline:
        models = {"base": (settings.baseline, settings.baseline_samples)} | models
    candidates = {name: open_candidate(config, Path(weights), given) for name, (weights, given) in models.items()}
    metrics, left_out = choose_metrics(config, bench, candidates)
    if settings.latency_table:
        check_depths(config, [candidate.facts["depth"] for candidate in candidates.values()])
    protocols = [{k: v for k, v in c.protocol.items() if k not in OF_THE_MODEL} for c in candidates.values()]
    different = [k for k in protocols[-1] if protocols[0].get(k) != protocols[-1][k]]
    if different:
        message = f"the two sets of samples differ in {', '.join(different)}, so their figures cannot be compared. "
        raise ValueError(message + "Draw both with the same settings.")
    references = bench.measured(settings.batch_size)
    if settings.save_reference and comm.is_main():
        save_reference(references["whole"], Path(settings.save_reference))
    seen, folders = {}, []
    for name, candidate in candidates.items():
        parts = cache / f"samples_{name}_{candidate.protocol.get('weights_digest', '')}.parts"
        folders += [parts.name] if candidate.drawer is not None else []
        seen[name] = look(config, bench, candidate, parts)
    comm.barrier()
    comm.shutdown()  # the rest is rank 0's, and nobody waits for it
    if not comm.is_main():
        return None
    result: dict[str, Any] = {}
    for name, candidate in candidates.items():
        found = figures(seen[name], references, bench.extractor, metrics, settings.neighbours, settings.kid_seed)
        result[name] = candidate.facts | found
    weights = {name: candidate.weights for name, candidate in candidates.items()}
    result |= latency(config, weights, result)
    if settings.latency_table:
        result["latency_table"] = measure_table(config, weights)
    accuracy = bench.extractor.test_accuracy
    result["protocol"] = protocols[-1] | {
        "reference": bench.description, "reference_about": references["whole"].about, **bench.extractor.description,
        **({} if accuracy is None else {"extractor_test_accuracy": accuracy}),
        "kid_seed": settings.kid_seed, "kid_subsets": "100 of up to 1000", "neighbours": settings.neighbours,
        "not_measured": left_out, "drawn": folders,
    }  # fmt: skip
    return result


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


COLUMNS = {
    "depth": ("depth", "{}"),
    "parameters": ("parameters", "{:,}"),
    "fid": ("FID", "{:.2f}"),
    "fid_validation": ("FID val", "{:.2f}"),
    "sfid": ("sFID", "{:.2f}"),
    "kid": ("KID x 1000", "{:.2f}"),
    "inception_score": ("IS", "{:.2f}"),
    "precision": ("precision", "{:.4f}"),
    "recall": ("recall", "{:.4f}"),
    "class_accuracy": ("class accuracy", "{:.4f}"),
}
BESIDE = ("reference", "reference_about", "extractor_test_accuracy", "not_measured", "drawn", "num_samples")
"""What of a protocol has a line of its own, or none."""

OF_THE_REFERENCE = ("images", "count", "num_classes", "class_names", "resolution", "digest", "features", "resize_mode")
"""What of the reference is printed beside the figures."""


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table, and below it what they depend on."""
    from rich.console import Console
    from rich.table import Table

    protocol = result["protocol"]
    names = [name for name in ("base", "pruned") if name in result]
    table = Table(title=f"{protocol['num_samples']} samples, {protocol['reference']}")
    shown = {key: column for key, column in COLUMNS.items() if any(key in result[name] for name in names)}
    batches = list(result[names[0]]["latency_ms"])
    for column in ("model", *(title for title, _ in shown.values()), *(f"ms, batch {batch}" for batch in batches)):
        table.add_column(column)
    for name in names:
        r = result[name] | {"kid": 1000 * result[name]["kid"]} if "kid" in result[name] else result[name]
        row = [form.format(r[key]) if key in r else "-" for key, (_, form) in shown.items()]
        table.add_row(name, *row, *(f"{r['latency_ms'][b]:.2f}" for b in batches))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if "speedup" in result:
        spread = {b: f"{iqr['q25']:.2f} to {iqr['q75']:.2f}" for b, iqr in result["speedup_iqr"].items()}
        text = ", ".join(f"{v:.2f}x ({spread[b]}) at batch {b}" for b, v in result["speedup"].items())
        console.print(f"measured speed-up, median (interquartile range) of paired repeats: {text}")
    console.print(", ".join(f"{key} {value}" for key, value in protocol.items() if key not in BESIDE), highlight=False)
    about = protocol.get("reference_about", {})
    console.print(
        "real images: " + ", ".join(f"{k} {about[k]}" for k in OF_THE_REFERENCE if k in about), highlight=False
    )
    if "extractor_test_accuracy" in protocol:
        console.print(f"test accuracy of the extractor: {protocol['extractor_test_accuracy']:.4f}")
    for name, why in protocol.get("not_measured", {}).items():
        console.print(f"not measured: {name}: {why}")


def log_figures(folder: Path, result: dict[str, Any]) -> None:
    """Add the figures to the W&B run of the training, if it had one."""
    from entprune_ds.monitor.metrics import open_monitor

    if (folder / "wandb_id.txt").is_file():
        trained = config_from_dict(read_yaml((folder / "config.yaml").read_text()))  # what W&B goes on showing
        monitor = open_monitor(replace(trained, monitor=replace(trained.monitor, wandb=True)), folder, enabled=True)
        monitor.summary({f"eval/{k}": v for k, v in result.items()})
        monitor.finish()


if __name__ == "__main__":
    leave(main())
