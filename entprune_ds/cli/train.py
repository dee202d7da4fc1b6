"""`entprune_ds.cli.train`: train, and prune while training. Started by deepspeed, torchrun or plain python."""

from __future__ import annotations

import os

from entprune_ds.cli.common import help_text, launched_words, leave, refuse, wants_help
from entprune_ds.config import ConfigError, load_config
from entprune_ds.launcher import launchers

HELP = """\
Train a diffusion or flow transformer (DiT, SiT) under DeepSpeed and remove blocks, heads or channels while it trains.

  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits data.shards=data_digits/train
  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits_prune model.weights=runs/base/model run.name=small
  deepspeed --num_gpus 8 --module entprune_ds.cli.train preset=dit_xl2_256 model.weights=dit_xl2 \
      data.shards=latents/train prune.target_depth=14 prune.end_step=20000 train.num_steps=100000
  torchrun --nproc_per_node 8 -m entprune_ds.cli.train preset=...
  python -m entprune_ds.cli.train preset=...                    (one process)
  sbatch --nodes 4 slurm/prune_xl.sh preset=...                 (Slurm; requeues itself until the training is done)

The same command again resumes from the newest checkpoint, exactly. Without a GPU the ranks run on the CPU over gloo.
--dry-run checks settings, data and weights as a start does and stops; the data may be left out. It prints them with the
memory that a rank will need, part by part, and the time of a resize. Nothing is launched, so any job can be asked for:

  WORLD_SIZE=64 LOCAL_WORLD_SIZE=8 entprune-ds train preset=... parallel.zero_stage=3 --dry-run     (8 nodes of 8)

SIGUSR1 to a rank makes all ranks save a checkpoint and leave. Exit status: 0 done; 85 saved and left as asked; 75
another rank or the launcher is gone; 2 refused, or an error with a remedy; 128 + signal when interrupted; 1 other.

The run folder RUNS/NAME holds config.yaml, metrics.jsonl, decisions.jsonl, checkpoints/, samples/ and model/.
"""
SECTIONS = [
    "run", "model", "data", "train", "diffusion", "parallel", "prune", "score", "race", "learned", "soft", "distill",
    "resize", "sample", "monitor",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused before any work."""
    words, dry_run = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        if dry_run:
            from entprune_ds.cli.dry_run import describe

            return describe(words)
        from entprune_ds.preflight import training_problems

        config = load_config(words, check=training_problems)
    except ConfigError as error:
        return refuse(error.problems)
    limit_threads()
    from entprune_ds.trainer import train

    train(config, words)
    return 0


def limit_threads() -> None:
    """Share the cores between the ranks of this node, unless OMP_NUM_THREADS says otherwise.

    A launcher sets that variable to 1 for its ranks, which nobody has asked for; what Slurm's script sets counts.
    """
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if "OMP_NUM_THREADS" in os.environ and (ranks == 1 or not launchers()):
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


if __name__ == "__main__":
    leave(main())
