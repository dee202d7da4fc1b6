"""Soft pruning with real ranks: folding into sharded state, whole trainings to the target, exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from entprune_ds.config import Config, config_from_dict, load_config
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.engine.checkpoint import read_checkpoint
from entprune_ds.export import checkpoint_source
from entprune_ds.interop.safetensors import read_export
from entprune_ds.interop.source import loaded_model
from entprune_ds.macs import blocks_macs
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.soft_mask import SoftState
from entprune_ds.run_state import validation_draws
from tests.ranks import run_ranks
from tests.test_training import cut_after, equal_state, losses, named_state, what_was_logged, words

FULL = pytest.mark.full
TOPOLOGIES = [(1, "fp32", 1), (3, "fp32", 1), (1, "fp32", 2)]
OTHERS = [
    (0, "fp32", 1),
    (2, "fp32", 1),
    (0, "fp32", 2),
    (0, "bf16", 1),
    (1, "bf16", 1),
    (3, "bf16", 1),
    (1, "bf16", 2),
]
SOFT = [
    "soft.every=2", "soft.end_step=10", "soft.removals=2", "soft.units=[block,head,channel]", "soft.eta=0.2",
    "soft.budget_weight=2.4", "soft.target_macs=0.5", "score.gradient_batches=2", "score.gradient_batch_size=8",
]  # fmt: skip


@pytest.mark.parametrize("topologies", [TOPOLOGIES, pytest.param(OTHERS, marks=FULL)], ids=["usual", "others"])
def test_gates_fold_into_sharded_state_and_nothing_that_is_computed_changes(topologies):
    ranks = run_ranks("tests.workers.soft:folds", 2, topologies=topologies)
    for found in ranks:
        for topology, gaps in zip(topologies, found, strict=True):
            assert gaps["gating"] > 0.05, topology
            assert gaps["folding"] < 1e-5 and gaps["state"] < 1e-5, topology
            near = 1e-5 if topology[1] == "fp32" else 2e-2
            assert gaps["training"] < near and gaps["training_folded"] < near, topology
            assert gaps["scoring"] == 0 and gaps["gates_left"] == 0, topology
            assert gaps["norm"] == pytest.approx(found[0]["norm"], rel=1e-4)


def test_what_stays_computes_what_the_last_mask_said():
    [found] = run_ranks("tests.workers.soft:updated_and_resized", 1)
    assert (found["depth"], found["gates"]) == (2, 2)
    assert found["smallest"] < 0.95 and found["gap"] < 1e-5


def macs_share(run: Path) -> float:
    """Multiply-accumulates of the blocks of the exported model over those of the model at the start."""
    start = read_checkpoint(run / "checkpoints/step_00000012").manifest["record"]["config"]
    return blocks_macs(read_export(run / "model")[0]) / blocks_macs(config_from_dict(start).model)


def exported_loss(model: DiT, config: Config) -> float:
    """Validation loss of a model in one process."""
    draws, objective = validation_draws(config), build_objective(config.model, config.diffusion)
    with torch.no_grad():
        return objective.loss(model(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean().item()


def test_a_run_reaches_its_target_and_resumes_exactly(digits, tmp_path):
    whole = tmp_path / "whole"
    settings = ["parallel.ds_config=zero3_fp32", "train.checkpoint_every=3", "train.validate_every=3", *SOFT]
    command = words(digits, tmp_path, "whole", *settings)
    assert run_ranks("tests.workers.training:train", 2, runs=[command]) == [[0], [0]]
    decisions = [json.loads(line) for line in (whole / "decisions.jsonl").read_text().splitlines()]
    assert [d["step"] for d in decisions] == [6, 10] and [d["forced"] for d in decisions] == [False, True]
    assert decisions[-1]["narrow"]
    assert 0.3 < macs_share(whole) <= 0.5
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    budgets = [row["prune/soft_budget"] for row in rows if "prune/soft_budget" in row]
    assert budgets == pytest.approx([0.5 + 0.5 * (1 - step / 10) ** 3 for step in (2, 4, 6, 8, 10)])
    around = [row["train/validation_loss"] for row in rows if row["step"] == 6 and "train/validation_loss" in row]
    assert len(around) == 3  # of the step, with the new mask, after the removal
    assert around[1] != around[0] and around[2] == pytest.approx(around[1], rel=0.05)

    # at step 3 there are gates that are not in the weights yet: the run validates with them, an export folds them
    middle = read_checkpoint(whole / "checkpoints/step_00000003")
    stored, gates = named_state(middle.folder), SoftState.from_json(middle.manifest["record"]["soft"]).gates()
    model, config = loaded_model(checkpoint_source(middle, "raw")), load_config(command)
    block = next(b for b in gates if gates[b]["gate"] != 1)
    expected = stored[f"weight/blocks.{block}.mlp.fc2.bias"] * gates[block]["gate"].float()
    assert torch.equal(model.blocks[str(block)].mlp.fc2.bias, expected)
    assert torch.equal(model.blocks[str(block)].mlp.fc1.bias, stored[f"weight/blocks.{block}.mlp.fc1.bias"])
    [logged] = [row["train/validation_loss"] for row in rows if row["step"] == 3 and "train/validation_loss" in row]
    assert exported_loss(model, config) == pytest.approx(logged, rel=1e-6)
    raw = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(raw[name].view_as(p))
    assert exported_loss(model, config) != pytest.approx(logged, rel=1e-5)

    cuts = [cut_after(whole, tmp_path / f"from_{step}", step) for step in (9, 3)]
    runs = [words(digits, tmp_path, cut.name, *settings) for cut in cuts]
    assert run_ranks("tests.workers.training:train", 2, runs=runs) == [[0, 0]] * 2
    for cut in cuts:
        assert losses(cut) == losses(whole)
        assert what_was_logged(cut) == what_was_logged(whole)
        assert equal_state(cut / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
        assert (cut / "decisions.jsonl").read_text() == (whole / "decisions.jsonl").read_text()


@FULL
def test_topologies_train_the_same_soft_pruned_model(digits, tmp_path):
    names = {"zero1": ["parallel.ds_config=zero1_fp32"], "zero3": ["parallel.ds_config=zero3_fp32"],
             "pipe": ["parallel.ds_config=zero1_fp32", "parallel.pipe_stages=2"]}  # fmt: skip
    runs = [words(digits, tmp_path, n, *more, *SOFT) for n, more in names.items()]
    blocks = ["soft.units=[block]", "soft.target_macs=null"]  # two of four blocks, by prune.target_depth
    runs += [words(digits, tmp_path, f"{n}_blocks", *more, *SOFT, *blocks) for n, more in names.items()]
    assert run_ranks("tests.workers.training:train", 2, runs=runs, timeout=500) == [[0] * 6] * 2
    for suffix in ("", "_blocks"):
        decided = [(tmp_path / f"{n}{suffix}" / "decisions.jsonl").read_text().splitlines() for n in names]
        kept = [[(json.loads(d)["kept_blocks"], json.loads(d)["narrow"]) for d in lines] for lines in decided]
        assert kept[0] == kept[1] == kept[2]
        expected = losses(tmp_path / f"zero1{suffix}")
        for n in names:
            assert losses(tmp_path / f"{n}{suffix}") == pytest.approx(expected, rel=1e-4)
    assert all(macs_share(tmp_path / f"{n}_blocks") == 0.5 for n in names)
