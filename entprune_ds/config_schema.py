"""Every setting of a run: frozen dataclasses with a docstring under each field, which `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    path: str = "linear"
    """process=sit: path between noise and data: linear, gvp or vp (SiT, table 1)."""
    prediction: str = "velocity"
    """process=sit: what the model predicts: velocity, score or noise."""
    loss_weight: str = "none"
    """process=sit: weight of score and noise losses over t: none, velocity or likelihood."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = ""
    """Training shards: a folder written by `entprune-ds shards`, a brace pattern of tar files, or http(s) URLs of
    either."""
    val_shards: str = ""
    """Validation shards, in the same forms; empty means SHARDS/../val where it exists."""
    num_readers: int = 64
    """Virtual readers that define the order of examples; the data-parallel size must divide it, it must divide
    train.global_batch_size, and there must be as many shards."""
    shuffle_buffer: int = 1024
    """Examples that one reader shuffles together; a rank holds that many for each reader of it (32 KiB each for 4x32x32
    latents from moments)."""
    num_workers: int = 2
    """Processes that read for each rank, at most one per reader of it; 0 reads in the training process. They do not
    change the order. `shards` command: processes that read and crop images side by side; 0 works in this one."""
    prefetch: int = 4
    """Batches that the workers of a rank prepare ahead, in shared memory."""
    max_skipped: int = 16
    """Damaged examples that may be skipped in the run (each is counted once and reported); one more ends it. A missing
    shard, or one whose size or checksum is wrong, is always an error."""
    allow_pipe: bool = False
    """Whether shards may be `pipe:` and a shell command that prints them, such as `pipe:aws s3 cp s3://b/{0..9}.tar -`.
    Counts on the command line only, not in a preset: it runs a shell."""
    flip: bool = False
    """Mirror each example with probability 1/2, anew in every epoch; for shards of pixels and of moments."""
    latent_scale: float = 0.18215
    """Factor of the latents that are drawn from moments (0.18215 for the VAE of DiT and SiT)."""
    out: str = ""
    """`shards` and `encode` commands: the folder to write."""
    shard_size: int = 128
    """`shards` command: examples per tar file."""
    source: str = "digits"
    """`shards` command: folder (of images, one sub-folder per class), csv, webdataset (tars of images) or digits."""
    src: str = ""
    """`shards` command: the image folder, the CSV file, or the folder or brace pattern of tars."""
    image_size: int = 256
    """`shards` command: side of the square pixels that are stored."""
    num_classes: int | None = None
    """`shards` command: labels lie below it; null means as many classes as the source has."""
    val_fraction: float = 0.0
    """`shards` command: share of the images for OUT/val, drawn by run.seed; 0 for sources that have a folder val."""
    max_unreadable: float = 0.01
    """`shards` command: largest share of the images that may be unreadable."""
    max_pixels: int = 100_000_000
    """`shards` command: largest width x height of an image; larger ones count as unreadable."""
    encode_batch: int = 32
    """`encode` command: images that the VAE encodes together."""
    encode_dtype: str = "float32"
    """`encode` command: precision of the VAE: float32 or bfloat16."""


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
    """process=sit: euler, heun, dopri5 (ODE) or sde (Euler-Maruyama); process=dit: ddpm or ddim."""
    num_steps: int = 25
    """Sampler steps (dopri5 chooses its own)."""
    atol: float = 1e-6
    """dopri5: absolute tolerance."""
    rtol: float = 1e-3
    """dopri5: relative tolerance."""
    sde_diffusion: str = "sigma"
    """sde: diffusion coefficient: constant, sbdm, sigma, linear, decreasing or increasing-decreasing."""
    sde_norm: float = 1.0
    """sde: factor of the diffusion coefficient."""
    sde_last_step: str = "mean"
    """sde: last step: none, mean, tweedie or euler."""
    sde_last_step_size: float = 0.04
    """sde: size of the last step."""
    ddim_eta: float = 0.0
    """ddim: 0 is deterministic, 1 has the noise of ddpm."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is no guidance."""
    cfg_channels: int | None = None
    """Channels that are guided: 3 is the published protocol of DiT and SiT; null guides all."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the sampling in which guidance acts, from 0 (pure noise) to 1 (data)."""
    vae: str = ""
    """Decoder of latents: folder or hub name of a diffusers AutoencoderKL; empty for models of pixels."""
    vae_revision: str = ""
    """Revision of a hub name; recorded with the samples."""
    num_samples: int = 1797
    """Samples to draw; labels follow `labels`."""
    batch_size: int = 256
    """Samples drawn together."""
    seed: int = 0
    """Seed; every sample has its own stream, so the number of ranks and the batch do not matter."""
    labels: str = "uniform"
    """Labels: uniform (independent uniform draws) or balanced (0, 1, 2, ... repeated)."""
    out: str = ""
    """Output: a folder of PNG files, or a path ending in .npz."""
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
    samples: str = ""
    """Samples of the model, an npz written by `entprune-ds sample`; empty draws them now."""
    baseline_samples: str = ""
    """Samples of the baseline, likewise."""
    out: str = ""
    """JSON file of the figures."""


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
