"""`entprune_ds.cli.train`: train, and prune while training. Started by deepspeed, torchrun or plain python."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from entprune_ds.cli.common import help_text, launched_words, leave, refuse, wants_help
from entprune_ds.config import Config, ConfigError, load_config, to_yaml
from entprune_ds.redact import redacted

HELP = """\
Train a flow transformer under DeepSpeed and remove whole blocks while it trains.

  deepspeed --num_gpus 2 --module entprune_ds.cli.train preset=digits data.shards=data_digits/train
  deepspeed --num_gpus 8 --module entprune_ds.cli.train preset=digits_prune model.weights=runs/base/model run.name=small
  torchrun --nproc_per_node 8 -m entprune_ds.cli.train preset=...
  python -m entprune_ds.cli.train preset=...                    (one process)

The same command again resumes from the newest checkpoint, exactly. Without a GPU the ranks run on the CPU over gloo.
--dry-run checks settings, data and weights as a start does, prints them and the size of the model, and stops; the data
may be left out.
The run folder RUNS/NAME holds config.yaml, metrics.jsonl, decisions.jsonl, checkpoints/, samples/ and model/.
"""
SECTIONS = ["run", "model", "data", "train", "parallel", "prune", "sample", "monitor"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 refused before any work."""
    words, dry_run = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        if dry_run:
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
    """Share the cores between the ranks of this node, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ or os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def describe(words: list[str]) -> int:
    """--dry-run: the resolved settings, and what they, the data and the weights amount to; checked as for a start."""
    from entprune_ds.preflight import training_problems

    config = load_config(words, check=partial(training_problems, data_needed=False))
    from entprune_ds.engine.ds_config import batch_plan, zero_stage
    from entprune_ds.models.registry import count_parameters

    world_size, stages = int(os.environ.get("WORLD_SIZE", "1")), config.parallel.pipe_stages
    stage, (micro, accumulation) = zero_stage(config), batch_plan(config, world_size // stages)
    if os.environ.get("RANK", "0") == "0":
        print(to_yaml(config), end="")
        parameters = count_parameters(config.model)
        state = 16 * parameters / 2**20
        print(f"# {parameters:,} parameters; {state:,.1f} MiB of weights, moments and EMA over all ranks")
        ranks = f"{stages} stage(s) x {world_size // stages}" if stages > 1 else f"{world_size}"
        print(f"# ZeRO-{stage}, {ranks} rank(s) x micro-batch {micro} x accumulation {accumulation}")
        print(_data_line(config), _weights_line(config), sep="\n")
    return 0


def _data_line(config: Config) -> str:
    from entprune_ds.data.index import load_index

    if not config.data.shards:
        return "# data: none given yet (data.shards)"
    index = load_index(config.data.shards, config.data.allow_pipe)
    shape = "x".join(map(str, index.shape))
    counts = f"{index.total:,} examples in {len(index.shards):,} shards, {index.num_classes:,} classes"
    return f"# data: {counts}, {index.kind} of shape {shape}: {redacted(config.data.shards)}"


def _weights_line(config: Config) -> str:
    from entprune_ds.engine.checkpoint import step_folders
    from entprune_ds.interop.weights import open_weights

    checkpoints = step_folders(config.run_dir / "checkpoints")
    if checkpoints:
        return f"# weights: {config.run_dir} goes on from {checkpoints[-1].name}"
    if not config.model.weights:
        return f"# weights: random, seed {config.run.seed}"
    source = open_weights(Path(config.model.weights), assumed=config.model)
    m, facts = source.model, source.facts
    size = f"{m.process}, patch {m.patch_size}, width {m.hidden_size}, {m.num_heads} heads"
    depth = f"depth {len(m.blocks)} of {m.depth}"
    return f"# weights: {size}, {depth}, step {facts['step']}, {facts['weights']}: {config.model.weights}"


if __name__ == "__main__":
    leave(main())
