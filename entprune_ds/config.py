"""Every setting of a run: frozen dataclasses, merged as defaults <- preset YAML <- key=value.

All checks that need neither a GPU nor a process group happen here, and all problems are reported
at once. No torch is imported, so `--help` and `--dry-run` answer immediately.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PRESETS = Path(__file__).parent / "presets"


class ConfigError(ValueError):
    """One error that lists every problem found, one per line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run; its folder is ROOT/NAME."""
    root: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of everything random; every draw is a pure function of (seed, purpose, step, slot)."""
    timeout_seconds: int = 300
    """Longest time a rank waits in a collective before the job ends with an error."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    process: str = "sit"
    """Generative process of the model: sit (flow matching)."""
    depth: int = 28
    """Number of transformer blocks of the original, unpruned model."""
    kept_blocks: tuple[int, ...] | None = None
    """Original indices of the blocks that are present; null means all of them."""
    hidden_size: int = 1152
    """Width of the residual stream."""
    num_heads: int = 16
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over hidden_size."""
    patch_size: int = 2
    """Side of a patch in latent pixels; must divide input_size."""
    input_size: int = 32
    """Side of the square latent."""
    in_channels: int = 4
    """Channels of the latent."""
    num_classes: int = 1000
    """Classes; index num_classes is the null label of classifier-free guidance."""
    learn_sigma: bool = False
    """Whether the head has a second half of output channels (official DiT and SiT checkpoints)."""
    weights: str = ""
    """Folder written by `entprune-ds export` (or by a run) to start from; empty means random."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Original indices of the present blocks, sorted."""
        return tuple(range(self.depth)) if self.kept_blocks is None else self.kept_blocks


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = ""
    """Training shards: a folder written by `entprune-ds shards`, or a brace pattern of tar files."""
    val_shards: str = ""
    """Validation shards, in the same forms; empty means SHARDS/../val where it exists."""
    num_readers: int = 4
    """Virtual readers that define the order of examples; the data-parallel size must divide it."""
    shuffle_buffer: int = 1024
    """Examples that one reader shuffles together."""
    out: str = ""
    """`shards` command: the folder to write."""
    shard_size: int = 128
    """`shards` command: examples per tar file."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 256
    """Examples per optimizer step over all ranks = micro batch x accumulation x data-parallel size."""
    micro_batch_size: int | None = None
    """Examples per rank and forward pass; null means no gradient accumulation."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step of the cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_schedule: str = "constant"
    """Learning rate after the warm-up: constant or cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.9999
    """Decay of the weight average; warmed up as min(decay, (1 + n) / (10 + n)), n since the last resize."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null label, for classifier-free guidance."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides those before a removal."""
    validate_every: int = 200
    """Steps between validation losses (raw and EMA weights); 0 switches them off."""
    validation_draws: int = 512
    """Fixed (example, t, noise) draws of the validation loss."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ds_config: str = "zero1_bf16"
    """DeepSpeed configuration: a name in ds_configs/ or a path to a JSON file without batch keys."""
    zero_stage: int | None = None
    """ZeRO stage 0-3; null takes the one of ds_config."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    target_depth: int | None = None
    """Blocks that remain at the end; null trains without pruning."""
    criterion: str = "ced"
    """Which blocks go first: ced, ced_abs, loss, random, every_other or explicit."""
    explicit_order: tuple[int, ...] = ()
    """criterion=explicit: original block indices in the order of removal."""
    num_checks: int = 4
    """Pruning checks; one stands at the start of each of this many equal parts of the pruning phase."""
    start_step: int = 0
    """First step of the pruning phase."""
    end_step: int | None = None
    """End of the pruning phase; null means train.num_steps."""
    max_blocks_per_check: int | None = None
    """Cap of every check; null means ceil(2 (depth - target_depth) / num_checks)."""
    calibration_draws: int = 1024
    """Paired draws (example, t, noise) of the block scores."""
    calibration_batch: int = 128
    """Draws scored together; also the size of a jackknife group of the standard errors."""
    ntk_samples: int = 16
    """Samples of the NTK condition number."""
    ntk_repeats: int = 3
    """Repeats of the NTK condition number; the median counts."""
    zico_batches: int = 8
    """Fixed batches of the ZiCo score."""
    zico_batch_size: int = 16
    """Examples per ZiCo batch."""
    vote_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of the NTK rank and of the ZiCo rank in the vote."""
    vote_tolerance: float = 0.01
    """Relative difference below which two candidate depths tie."""
    score_dtype: str = "float32"
    """Precision of the scoring passes: float32 or float64."""
    score_only: bool = False
    """Run every check and record its decision, but remove nothing."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    sampler: str = "euler"
    """ODE sampler: euler or heun."""
    num_steps: int = 25
    """Sampler steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is no guidance."""
    num_samples: int = 1797
    """Samples to draw; labels follow `labels`."""
    batch_size: int = 256
    """Samples drawn together."""
    seed: int = 0
    """Seed; every sample has its own stream, so the number of ranks and the batch do not matter."""
    weights: str = "ema"
    """Weights to sample from: ema or raw."""
    labels: str = "uniform"
    """Labels: uniform (independent uniform draws) or balanced (0, 1, 2, ... repeated)."""
    out: str = ""
    """Output: a folder of PNG files, or a path ending in .npz; empty means RUN/samples/final.npz."""
    grid: int = 80
    """Samples shown in the PNG grid."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    baseline: str = ""
    """Model folder to compare with (the unpruned base); empty evaluates one model only."""
    latency_batches: tuple[int, ...] = (1, 64)
    """Batch sizes of the latency measurement."""
    latency_repeats: int = 15
    """Interleaved repeats of the latency measurement; the median counts."""
    out: str = ""
    """JSON file of the figures; empty means RUN/evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    log_every: int = 10
    """Steps between logged training metrics."""
    sample_every: int = 0
    """Steps between sample grids; 0 draws them only around removals and at the end."""
    wandb: bool = True
    """Log to Weights & Biases (offline when no API key is set)."""
    wandb_project: str = "entprune_ds"
    """Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    """The run: name, folder, seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture and starting weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and their order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """DeepSpeed."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """What is removed, and when."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sampling."""
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    """Figures."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Logging."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.root) / self.run.name


# ---------------------------------------------------------------- reading


def load_config(arguments: list[str], check: typing.Callable[[Config], list[str]] | None = None) -> Config:
    """Merge defaults, `preset=NAME` and `key=value` arguments into a checked Config.

    Args:
        arguments: command-line words, each `key=value`; `preset` names a packaged preset or a file.
        check: further problems to look for; defaults to `problems_of`.

    Raises:
        ConfigError: listing every unknown key, bad value and impossible combination.
    """
    problems: list[str] = []
    preset, overrides = "", []
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            problems.append(f"`{word}` is not of the form key=value. See --help.")
        elif key == "preset":
            preset = value
        else:
            overrides.append(word)
    tree = OmegaConf.create({})
    for source in [lambda: _read_preset(preset)] + [lambda w=word: OmegaConf.from_dotlist([w]) for word in overrides]:
        try:
            tree = OmegaConf.merge(tree, source())
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError) as error:
            problems.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    values = OmegaConf.to_container(tree, resolve=False)
    problems += _interpolations(values)
    config = config_from_dict(values, problems) if isinstance(values, dict) else Config()
    if not problems:
        problems = (check or problems_of)(config)
    if problems:
        raise ConfigError(problems)
    return config


def _read_preset(name: str) -> Any:
    if not name:
        return OmegaConf.create({})
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        raise ValueError(f"preset `{name}` does not exist. Choose one of {', '.join(known)}, or give a .yaml file.")
    return OmegaConf.load(path)


def _interpolations(values: Any, path: str = "") -> list[str]:
    """Refuse `${...}`: resolvers could read the environment, and a config must say what it means."""
    if isinstance(values, dict):
        return [p for k, v in values.items() for p in _interpolations(v, f"{path}.{k}" if path else str(k))]
    if isinstance(values, list):
        return [p for v in values for p in _interpolations(v, path)]
    if isinstance(values, str) and "${" in values:
        return [f"`{path}` contains an interpolation (`${{`). Interpolations are disabled: write the value itself."]
    return []


def config_from_dict(values: dict, problems: list[str] | None = None) -> Config:
    """Build a Config from nested plain values, as stored in config.yaml.

    Raises:
        ConfigError: when `problems` is None and a key or a type is wrong.
    """
    found: list[str] = [] if problems is None else problems
    config = _section(Config, values, "", found)
    if problems is None and found:
        raise ConfigError(found)
    return config


def _section(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        problems.append(f"`{path}` must be a group of settings, got {values!r}.")
        return cls()
    chosen = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean `{path + '.' if path else ''}{near[0]}`?" if near else f" Known: {', '.join(hints)}."
            problems.append(f"`{name}` is not a setting.{hint}")
        elif dataclasses.is_dataclass(hints[key]):
            chosen[key] = _section(hints[key], value, name, problems)
        else:
            try:
                chosen[key] = _convert(value, hints[key])
            except (TypeError, ValueError):
                problems.append(f"`{name}` must be {_describe(hints[key])}, got {value!r}.")
    return cls(**chosen)


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError
        return tuple(_convert(v, args[0]) for v in value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        many = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{many} ({_describe(args[0])} each)"
    return names.get(hint, str(hint))


# ---------------------------------------------------------------- checking

CRITERIA = ("ced", "ced_abs", "loss", "random", "every_other", "explicit")


def problems_of(config: Config) -> list[str]:
    """Every impossible value or combination that can be known without data, GPUs or other ranks."""
    model, train, prune, data = config.model, config.train, config.prune, config.data
    found: list[str] = []

    def require(ok: bool, message: str) -> None:
        if not ok:
            found.append(message)

    def positive(section: str, values: Any, *keys: str) -> None:
        for key in keys:
            got = getattr(values, key)
            require(got is None or got > 0, f"`{section}.{key}` must be above 0, got {got}.")

    def one_of(key: str, got: Any, known: tuple) -> None:
        require(got in known, f"`{key}` must be one of {', '.join(map(str, known))}, got {got}.")

    plain_name = (
        bool(config.run.name) and config.run.name not in (".", "..") and not set(config.run.name) & set("/\\\0")
    )
    require(plain_name, f"`run.name` must be one folder name, got {config.run.name!r}.")
    positive("run", config.run, "timeout_seconds")
    keys = ("depth", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "input_size", "in_channels", "num_classes")
    positive("model", model, *keys)
    one_of("model.process", model.process, ("sit",))
    if not found:
        divides = model.hidden_size % model.num_heads == 0
        require(
            divides, f"`model.num_heads` must divide `model.hidden_size` ({model.hidden_size}), got {model.num_heads}."
        )
        require(model.hidden_size % 4 == 0, f"`model.hidden_size` must be a multiple of 4, got {model.hidden_size}.")
        divides = model.input_size % model.patch_size == 0
        require(
            divides, f"`model.patch_size` must divide `model.input_size` ({model.input_size}), got {model.patch_size}."
        )
    if model.kept_blocks is not None:
        kept = model.kept_blocks
        ok = len(kept) > 0 and list(kept) == sorted(set(kept)) and all(0 <= b < model.depth for b in kept)
        require(
            ok,
            f"`model.kept_blocks` must be sorted block indices below `model.depth` ({model.depth}), got {list(kept)}.",
        )

    positive("data", data, "num_readers", "shuffle_buffer", "shard_size")
    positive("train", train, "num_steps", "global_batch_size", "micro_batch_size", "learning_rate", "checkpoint_every")
    positive("train", train, "keep_checkpoints", "validation_draws")
    require(train.validate_every >= 0, f"`train.validate_every` must be at least 0, got {train.validate_every}.")
    require(train.grad_clip >= 0, f"`train.grad_clip` must be at least 0, got {train.grad_clip}.")
    require(train.warmup_steps >= 0, f"`train.warmup_steps` must be at least 0, got {train.warmup_steps}.")
    require(train.weight_decay >= 0, f"`train.weight_decay` must be at least 0, got {train.weight_decay}.")
    low = 0 <= train.min_learning_rate <= train.learning_rate
    require(low, f"`train.min_learning_rate` must lie in [0, train.learning_rate], got {train.min_learning_rate}.")
    require(all(0 <= b < 1 for b in train.betas), f"`train.betas` must lie in [0, 1), got {list(train.betas)}.")
    for key in ("label_dropout", "ema_decay"):
        got = getattr(train, key)
        require(0 <= got < 1, f"`train.{key}` must lie in [0, 1), got {got}.")
    one_of("train.lr_schedule", train.lr_schedule, ("constant", "cosine"))
    if train.global_batch_size > 0 and data.num_readers > 0:
        ok = train.global_batch_size % data.num_readers == 0
        message = "`data.num_readers` must divide `train.global_batch_size` "
        require(ok, message + f"({train.global_batch_size}), got {data.num_readers}.")
    if config.parallel.zero_stage is not None:
        one_of("parallel.zero_stage", config.parallel.zero_stage, (0, 1, 2, 3))
    found += _pruning_problems(config) if not found else []

    one_of("sample.sampler", config.sample.sampler, ("euler", "heun"))
    one_of("sample.weights", config.sample.weights, ("ema", "raw"))
    one_of("sample.labels", config.sample.labels, ("uniform", "balanced"))
    positive("sample", config.sample, "num_steps", "num_samples", "batch_size", "grid")
    positive("evaluate", config.evaluate, "latency_repeats")
    bad_batches = [b for b in config.evaluate.latency_batches if b < 1]
    require(not bad_batches, f"`evaluate.latency_batches` must be above 0, got {bad_batches}.")
    positive("monitor", config.monitor, "log_every")
    require(
        config.monitor.sample_every >= 0,
        f"`monitor.sample_every` must be at least 0, got {config.monitor.sample_every}.",
    )
    return found


def _pruning_problems(config: Config) -> list[str]:
    prune, depth = config.prune, len(config.model.blocks)
    found: list[str] = []
    if prune.criterion not in CRITERIA:
        found.append(f"`prune.criterion` must be one of {', '.join(CRITERIA)}, got {prune.criterion}.")
    if prune.score_dtype not in ("float32", "float64"):
        found.append(f"`prune.score_dtype` must be float32 or float64, got {prune.score_dtype}.")
    minima = dict(
        num_checks=1, calibration_draws=2, calibration_batch=1, ntk_samples=2, ntk_repeats=1,
        zico_batches=2, zico_batch_size=1, max_blocks_per_check=1,
    )  # fmt: skip
    for key, least in minima.items():
        got = getattr(prune, key)
        if got is not None and got < least:
            found.append(f"`prune.{key}` must be at least {least}, got {got}.")
    if min(prune.vote_weights) < 0 or sum(prune.vote_weights) <= 0:
        found.append(f"`prune.vote_weights` must be at least 0 and not both 0, got {list(prune.vote_weights)}.")
    if prune.vote_tolerance < 0:
        found.append(f"`prune.vote_tolerance` must be at least 0, got {prune.vote_tolerance}.")
    if prune.target_depth is None or found:
        return found
    if not 1 <= prune.target_depth < depth:
        remedy = "Lower it." if prune.target_depth >= depth else "Raise it to at least 1."
        found.append(f"`prune.target_depth` must be below `model.depth` ({depth}), got {prune.target_depth}. {remedy}")
        return found
    if prune.calibration_draws % prune.calibration_batch or prune.calibration_draws < 2 * prune.calibration_batch:
        message = "`prune.calibration_batch` must divide `prune.calibration_draws` into at least 2 groups "
        found.append(message + f"({prune.calibration_draws}), got {prune.calibration_batch}.")
    end = config.train.num_steps if prune.end_step is None else prune.end_step
    if not 0 <= prune.start_step < end <= config.train.num_steps:
        message = "`prune.start_step` < `prune.end_step` <= `train.num_steps` must hold, got "
        found.append(message + f"{prune.start_step}, {end}, {config.train.num_steps}.")
    elif end - prune.start_step < prune.num_checks:
        found.append(
            f"`prune.num_checks` ({prune.num_checks}) needs as many steps of pruning phase, got {end - prune.start_step}."
        )
    cap, to_remove = prune.max_blocks_per_check, depth - prune.target_depth
    if cap is not None and cap * prune.num_checks < to_remove:
        message = f"`prune.max_blocks_per_check` x `prune.num_checks` must reach {to_remove} blocks, "
        found.append(message + f"got {cap} x {prune.num_checks}. Raise one of them.")
    if prune.criterion == "explicit":
        order = prune.explicit_order
        if len(set(order)) != len(order) or not set(order) <= set(config.model.blocks) or len(order) < to_remove:
            message = f"`prune.explicit_order` must list at least {to_remove} different present blocks, "
            found.append(message + f"got {list(order)}.")
    return found


# ---------------------------------------------------------------- writing


def to_dict(config: Any) -> dict:
    """Nested plain values of a config dataclass; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def digest(values: Any) -> str:
    """SHA-256 of the canonical JSON of plain values; equal on every platform."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
