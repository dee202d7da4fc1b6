"""The models that `evaluate` measures: their samples, drawn before or to be drawn, and what can be said of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entprune_ds import comm
from entprune_ds.cli.drawing import Drawer, open_drawer, weights_digest
from entprune_ds.cli.evaluate_data import model_problem, shards_problem
from entprune_ds.cli.evaluate_inputs import Bench
from entprune_ds.cli.sample import drawn, protocol_path
from entprune_ds.config import Config
from entprune_ds.config_checks_evaluation import METRICS
from entprune_ds.evaluation.figures import lacking
from entprune_ds.evaluation.measure import Measured, measure
from entprune_ds.evaluation.sources import ImageSource, from_parts, open_images, own_range
from entprune_ds.interop.source import model_on_file
from entprune_ds.interop.weights import open_weights
from entprune_ds.logs import progress
from entprune_ds.models.registry import count_parameters
from entprune_ds.plain_json import parse_json


@dataclass(frozen=True)
class Candidate:
    """A model whose samples are to be measured: drawn before, or to be drawn."""

    weights: Path
    protocol: dict[str, Any]
    facts: dict[str, Any]
    """Depth, blocks, parameters, step, and which weights they are."""
    source: ImageSource | None
    drawer: Drawer | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,H,W,C) of the samples."""
        if self.source is not None:
            return self.source.shape
        assert self.drawer is not None
        return (len(self.drawer.labels), *self.drawer.image_shape)


def open_candidate(config: Config, weights: Path, samples: str) -> Candidate:
    """A model with its samples, or with what draws them.

    Raises:
        ValueError: samples of another model, damaged ones, or a model that cannot be read.
    """
    found = open_weights(weights, assumed=config.model)
    model, step, kept = found.model, found.facts["step"], list(found.model.blocks)
    facts = {"depth": len(model.blocks), "original_depth": model.depth, "kept_blocks": kept}
    facts |= {
        "parameters": count_parameters(model),
        "step": step,
        "model": str(weights),
        "num_classes": model.num_classes,
    }
    if not samples:
        drawer = open_drawer(config, weights)
        facts |= {"weights_digest": drawer.protocol["weights_digest"]}
        return Candidate(weights, drawer.protocol, facts, None, drawer)
    protocol = read_protocol(protocol_path(Path(samples)))
    if (protocol["step"], protocol["kept_blocks"]) != (step, kept):
        words = f"{samples} was drawn from blocks {protocol['kept_blocks']} at step {protocol['step']}"
        held = f"{weights} holds {kept} at step {step}"
        raise ValueError(f"{words}, but {held}. Run `entprune-ds sample` again.")
    facts |= {"weights_digest": weights_digest(model_on_file(found))}
    if protocol["weights_digest"] != facts["weights_digest"]:  # the same blocks and step, but of another training
        words = f"{samples} was drawn from {protocol['model']} with weights {protocol['weights_digest']}"
        held = f"{weights} holds weights {facts['weights_digest']}"
        raise ValueError(f"{words}, but {held}. Run `entprune-ds sample` again.")
    source = open_images(Path(samples))
    if source.shape[0] != protocol["num_samples"]:
        stated = f"its protocol says {protocol['num_samples']}"
        raise ValueError(f"{samples} holds {source.shape[0]} images, {stated}. Run `entprune-ds sample` again.")
    return Candidate(weights, protocol, facts, source, None)


def read_protocol(path: Path) -> dict[str, Any]:
    """What samples depend on, as `entprune-ds sample` wrote it.

    Raises:
        ValueError: a file that is no protocol.
    """
    try:
        protocol = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Run `entprune-ds sample` again.") from error
    needed = {"step", "kept_blocks", "num_samples", "model", "weights_digest"}
    if not isinstance(protocol, dict) or not needed <= set(protocol):
        raise ValueError(f"{path} is not the protocol of samples. Run `entprune-ds sample` again.")
    return protocol


def choose_metrics(
    config: Config, bench: Bench, candidates: dict[str, Candidate]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The figures to compute, and why the others are left out.

    Raises:
        ValueError: a figure that was asked for cannot be computed, FID among them unless others were asked for, or
            the samples have another size than the real images, or these are of another data set.
    """
    wanted, problems = config.evaluate.metrics, []
    if config.evaluate.save_reference and bench.statistics is not None:
        problems.append(
            "`evaluate.save_reference` needs images, but `evaluate.reference` holds statistics. Leave it out."
        )
    if bench.statistics is not None and (problem := shards_problem(bench.about, config)):
        problems.append(problem)
    left_out: dict[str, str] = {}
    for candidate in candidates.values():
        if bench.resolution is not None and candidate.shape[1:] != bench.resolution:
            shapes = f"{list(candidate.shape[1:])}, the real images {list(bench.resolution)} (H,W,C)"
            problems.append(f"samples of {candidate.weights} are {shapes}. They must be of one size.")
        if problem := model_problem(bench.about, candidate.facts["num_classes"], candidate.weights):
            problems.append(problem)
        left_out |= lacking(
            bench.probe, candidate.shape[0], bench.reference_rows, bench.spatial_width, config.evaluate.neighbours,
            bench.extractor.name,
        )  # fmt: skip
    needed = wanted or ("fid",)
    problems += [f"`evaluate.metrics`: {name}: {why}." for name, why in left_out.items() if name in needed]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    chosen = tuple(name for name in METRICS if name not in left_out and (not wanted or name in wanted))
    return chosen, {name: why for name, why in left_out.items() if not wanted}


def look(config: Config, bench: Bench, candidate: Candidate, folder: Path) -> Measured:
    """What the extractor says of the samples, after drawing those that are missing. Collective."""
    if candidate.drawer is None:
        ready: Any = nullcontext(candidate.source)
    else:
        ready = drawn(config, candidate.drawer, folder)
    with ready as found:
        source = found if candidate.drawer is None else from_parts(found, candidate.drawer.labels.numpy())
        mine = own_range(source.shape[0], comm.rank(), comm.world_size())
        with progress("look at samples", total=len(mine)) as line:
            return measure(source, bench.extractor, config.evaluate.batch_size, line.update)
