"""Every setting of a run: frozen dataclasses with a docstring under each field, which `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from entprune_ds.config_data import DataConfig
from entprune_ds.config_methods import CompareConfig, DistillConfig, LearnedConfig, RaceConfig, SoftConfig
from entprune_ds.config_prune import PruneConfig, ScoreConfig
from entprune_ds.config_sampling import EvalConfig, SampleConfig

NOT_ARCHITECTURE = ("weights", "compile", "activation_checkpointing")
"""Settings of `model` that do not change which function the model computes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run; its folder is ROOT/NAME."""
    root: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of everything random; every draw is a pure function of (seed, purpose, step, slot)."""
    timeout_seconds: int = 300
    """Longest time a rank may go without progress (a step, a collective) before the job ends with an error."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    process: str = "sit"
    """Generative process of the model: sit (flow matching) or dit (diffusion: epsilon and learned variance)."""
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
    block_widths: tuple[tuple[int, int, int], ...] = ()
    """Blocks that are narrower, each as [original index, attention heads, MLP channels]; heads keep their size."""
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
    norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP: 1e-6 in the official code, 1e-5 in diffusers (both: 1e-6 in other norms)."""
    frequency_shift: float = 0.0
    """Timestep frequencies are 10000^(-i / (half - shift)): 0 in the official code, 1 in diffusers."""
    compile: bool = False
    """Compile each block with torch.compile; a resize keeps the compiled code."""
    activation_checkpointing: bool = False
    """Recompute the activations of every block in the backward pass: less memory, about a third more time."""
    weights: str = ""
    """Weights to start from: an export folder, official .pt or safetensors file, or diffusers folder; empty: random."""

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: epsilon and variance of DiT; SiT throws a learn_sigma half away."""
        return self.in_channels * (2 if self.learn_sigma and self.process == "dit" else 1)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Original indices of the present blocks, sorted."""
        return tuple(range(self.depth)) if self.kept_blocks is None else self.kept_blocks

    @property
    def head_size(self) -> int:
        """Channels of one attention head, in narrow blocks too."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the MLP of a block that is not narrow."""
        return int(self.hidden_size * self.mlp_ratio)

    def widths(self, block: int) -> tuple[int, int]:
        """Attention heads and MLP channels of a block, by original index."""
        narrow = {index: (heads, channels) for index, heads, channels in self.block_widths}
        return narrow.get(block, (self.num_heads, self.mlp_size))

    def keeping(self, blocks: tuple[int, ...]) -> ModelConfig:
        """This architecture with these blocks only (original indices, sorted), each as wide as it is."""
        return replace(self, kept_blocks=blocks, block_widths=tuple(w for w in self.block_widths if w[0] in blocks))


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    path: str = "linear"
    """process=sit: path between noise and data: linear, gvp or vp (SiT, table 1)."""
    prediction: str = "velocity"
    """process=sit: what the model predicts: velocity, score or noise."""
    loss_weight: str = "none"
    """process=sit: weight of score and noise losses over t: none, velocity or likelihood."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000
    """Optimizer steps of the whole run."""
    stop_step: int | None = None
    """End here, with a checkpoint and a model; the same command with a later one, or none, goes on to num_steps."""
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
    bad_steps: int = 10
    """A step with a NaN or infinite loss or gradient, or a leap of the loss, is left out; after so many in a row the
    run goes back to its newest checkpoint from before, with the data that come next. 0 leaves no step out."""
    spike_deviations: float = 10.0
    """A loss above its running mean by so many running deviations is a leap; 0 never says so."""
    max_rollbacks: int = 3
    """Times that a run goes back after bad steps; the next time it stops with a report."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ds_config: str = "zero1_bf16"
    """DeepSpeed configuration: a name in ds_configs/ or a path to a JSON file without batch keys."""
    zero_stage: int | None = None
    """ZeRO stage 0-3; null takes the one of ds_config."""
    pipe_stages: int = 1
    """Pipeline stages; ranks = stages x data-parallel size. Above 1 needs ZeRO stage 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    park: str = "host"
    """Where the state waits while a resize rebuilds the engine: host (less GPU memory) or device (less time)."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    log_every: int = 10
    """Steps between logged training metrics."""
    sample_every: int = 0
    """Steps between sample grids; 0 draws them only around removals and at the end."""
    slow_every: int = 200
    """Steps between looks for a slow rank, in the time split that is logged (monitor.log_every); 0: never."""
    slow_factor: float = 1.5
    """A rank that takes so many times what the median rank takes, waiting apart, is told by name."""
    blocks_every: int = 100
    """Steps between norms and gates of every block on a fixed batch of 16 examples; 0 switches them off."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOPS, for train/mfu; null takes that of a known GPU in bf16, and shows none elsewhere."""
    wandb: bool = True
    """Log to Weights & Biases (offline when no API key is set)."""
    wandb_project: str = "entprune_ds"
    """Weights & Biases project."""
    count_macs: bool = False
    """Count the multiply-accumulates of every check, and of the first step at every architecture (`compare` does)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    """The run: name, folder, seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture and starting weights."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Training objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and their order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """DeepSpeed."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """What is removed, and when."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """How blocks are scored."""
    race: RaceConfig = field(default_factory=RaceConfig)
    """Recovery race (prune.criterion=recovery_race)."""
    learned: LearnedConfig = field(default_factory=LearnedConfig)
    """Learned gates (prune.criterion=learned)."""
    soft: SoftConfig = field(default_factory=SoftConfig)
    """Gradient-flow soft pruning."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Recovery with the unpruned model as the teacher."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """How a removal is carried out."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Sampling."""
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    """Figures."""
    compare: CompareConfig = field(default_factory=CompareConfig)
    """Comparison of criteria."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Logging."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.root) / self.run.name

    @property
    def protected_blocks(self) -> tuple[int, ...]:
        """Original indices of prune.protected_blocks, sorted; those that count from the end looked up at the start."""
        blocks = self.model.blocks
        return tuple(sorted({blocks[b] if b < 0 else b for b in self.prune.protected_blocks}))
