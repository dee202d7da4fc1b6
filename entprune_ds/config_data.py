"""Settings of the data: shards, their order, and how images become shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = ""
    """Training shards: a folder written by `entprune-ds shards`, a brace pattern of tar files, or http(s) URLs of
    either. A token after the `?` of a URL is used and never stored: every command, also run=FOLDER, needs it again."""
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
    """Different damaged examples that may be skipped in the run, each reported once; one more ends it. (The metric
    data/skipped counts every skip, in all epochs.) A missing shard, a wrong size or checksum, or an epoch of a reader
    without one sound example is always an error."""
    allow_pipe: bool = False
    """Whether shards may be `pipe:` and a shell command that prints them, such as `pipe:aws s3 cp s3://b/{0..9}.tar -`.
    Counts on the command line only, not in a preset: it runs a shell. Keep tokens in the environment, such as
    `-H "Authorization: Bearer $TOKEN"`: what is recognised as a secret is left out of the run folder."""
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
