"""Whole trainings with real ranks: pruning, inert scoring, exact resume, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tiny import load_model

FULL = pytest.mark.full
TINY = [
    "preset=digits_prune", "model.depth=4", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=16",
    "train.micro_batch_size=4", "train.num_steps=12", "train.validate_every=6", "train.validation_draws=32",
    "train.checkpoint_every=4", "train.keep_checkpoints=9", "train.warmup_steps=0", "prune.target_depth=2",
    "prune.num_checks=2", "prune.end_step=8", "score.draws=64", "score.batch_size=32",
    "prune.ntk_samples=4", "prune.ntk_repeats=1", "prune.zico_batches=2", "prune.zico_batch_size=4",
    "prune.criterion=loss", "sample.grid=4", "sample.num_steps=2", "monitor.log_every=1", "monitor.wandb=false",
]  # fmt: skip


def words(digits: str, root: Path, name: str, *more: str) -> list[str]:
    """Command line of a tiny training."""
    return [*TINY, f"data.shards={digits}/train", f"run.root={root}", f"run.name={name}", *more]


def named_state(folder: Path) -> dict[str, torch.Tensor]:
    """Full tensors "KEY/NAME" of a checkpoint, put together from its files."""
    manifest, state = json.loads((folder / "manifest.json").read_text()), {}
    for entry in manifest["files"]:
        tensors = load_file(folder / entry["name"])
        for name, start, stop in entry["ranges"]:
            for key in ("weight", "exp_avg", "exp_avg_sq", "ema"):
                full = state.setdefault(
                    f"{key}/{name}", torch.full((torch.Size(manifest["shapes"][name]).numel(),), float("nan"))
                )
                full[start:stop] = tensors[f"{key}/{name}"]
    return state


def equal_state(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same named state, to the bit."""
    first, second = named_state(a), named_state(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


INERT = [
    pytest.param("zero3_fp32", 2, 1),
    *(pytest.param(f"zero{stage}_fp32", world, 1, marks=FULL) for stage in (0, 1, 2) for world in (1, 2)),
    *(pytest.param(name, 2, 1, marks=FULL) for name in ("zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16")),
    *(pytest.param(name, 2, 2, marks=FULL) for name in ("zero0_fp32", "zero1_fp32", "zero1_bf16")),
    pytest.param("zero1_fp32", 4, 2, marks=FULL),
]


@pytest.mark.parametrize(("ds_config", "world_size", "stages"), INERT)
def test_checks_that_remove_nothing_change_nothing(digits, tmp_path, ds_config, world_size, stages):
    common = [f"parallel.ds_config={ds_config}", f"parallel.pipe_stages={stages}"]
    runs = [
        words(digits, tmp_path, "checked", *common, "prune.score_only=true"),
        words(digits, tmp_path, "plain", *common, "prune.target_depth=null"),
    ]
    run_ranks("tests.workers.training:train", world_size, runs=runs)
    assert len((tmp_path / "checked" / "decisions.jsonl").read_text().splitlines()) == 2
    checked, plain, last = tmp_path / "checked", tmp_path / "plain", "checkpoints/step_00000012"
    cuts = [json.loads((run / last / "manifest.json").read_text())["record"]["cut"] for run in (checked, plain)]
    assert len(losses(plain)) == 12
    if cuts[0] == cuts[1]:
        assert losses(checked) == losses(plain)
        assert equal_state(checked / last, plain / last)
    else:  # the times that were measured differ, and so does the order of sums
        assert stages > 1 and losses(checked) == pytest.approx(losses(plain), rel=1e-5 if "fp32" in ds_config else 1e-2)


def test_a_run_prunes_exports_and_resumes_exactly(digits, tmp_path):
    whole = tmp_path / "whole"
    more = ("train.validate_every=4", "prune.recovery_tolerance=1000")  # the second check reads one of its own step
    first = run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "whole", *more)])
    assert first == [[0], [0]]
    decisions = [json.loads(line) for line in (whole / "decisions.jsonl").read_text().splitlines()]
    assert [d["step"] for d in decisions] == [0, 4]
    assert [step for step, *_ in decisions[-1]["state"]["validations"]] == [0, 4]
    assert len(decisions[-1]["kept_blocks"]) == 2
    model, facts = load_model(whole / "model")
    assert facts["kept_blocks"] == decisions[-1]["kept_blocks"]
    assert list(model.blocks) == [str(b) for b in facts["kept_blocks"]]
    ema = named_state(whole / "checkpoints/step_00000012")
    assert all(torch.equal(p.reshape(-1), ema[f"ema/{n}"]) for n, p in model.named_parameters())

    picture = whole / "samples" / "step_00000009_training.png"  # of a step that the resumed runs have not reached
    picture.write_bytes((whole / "samples" / "step_00000012_final.png").read_bytes())
    for name, step in (("late", 8), ("at_check", 4)):  # before step 4 stands the second check: it is repeated
        cut = cut_after(whole, tmp_path / name, step)
        stray = dict(decisions[-1], step=9)
        with open(cut / "decisions.jsonl", "a") as file:
            file.write(json.dumps(stray) + "\n")
        run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, name, *more)])
        assert losses(cut) == losses(whole)
        assert what_was_logged(cut) == what_was_logged(whole)
        assert equal_state(cut / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
        assert (cut / "decisions.jsonl").read_text() == (whole / "decisions.jsonl").read_text()
        aside = (cut / "decisions.superseded.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in aside] == ([9] if step == 8 else [4, 9])
        assert (cut / "metrics.superseded.jsonl").is_file()
        assert not (cut / "samples" / picture.name).exists()
        assert (cut / "samples" / "superseded" / picture.name).is_file()


OTHER_PROCESSES = {
    "dit": ["model.process=dit", "model.learn_sigma=true", "sample.sampler=ddim"],
    "vp": [
        "diffusion.path=vp",
        "diffusion.prediction=noise",
        "diffusion.loss_weight=velocity",
        "sample.sampler=dopri5",
    ],
}


def test_diffusion_and_other_flows_train_score_prune_and_sample(digits, tmp_path, capsys):
    from entprune_ds.cli.sample import main as sample

    runs = [words(digits, tmp_path, n, "train.num_steps=9", *more) for n, more in OTHER_PROCESSES.items()]
    run_ranks("tests.workers.training:train", 2, runs=runs)  # dopri5: each rank's images need their own steps
    for name in OTHER_PROCESSES:
        run = tmp_path / name
        seen = losses(run)
        assert len(seen) == 9 and all(0 < loss < 1e3 for loss in seen.values())
        [_, last] = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
        assert len(last["kept_blocks"]) == 2 and all(v["value"] != 0 for v in last["scores"]["loss"].values())
        assert (run / "samples" / "step_00000009_final.png").is_file()
        model, facts = load_model(run / "model")
        assert len(model.blocks) == 2 and facts["model"]["process"] == ("dit" if name == "dit" else "sit")
        out = tmp_path / f"{name}.npz"
        assert sample([f"run={run}", f"out={out}", "sample.num_samples=10", "sample.cfg_scale=2"]) == 0
        protocol = json.loads((tmp_path / f"{name}_protocol.json").read_text())
        assert protocol["sampler"] == ("ddim" if name == "dit" else "dopri5") and protocol["cfg_interval"] == [0, 1]
    for name, expected in (("dit", "must be one of ddpm, ddim, got euler"), ("vp", "trained with vp. Set that value")):
        assert sample([f"weights={tmp_path / name / 'model'}", f"out={tmp_path / 'x.npz'}"]) == 2
        assert expected in capsys.readouterr().err


def cut_after(whole: Path, cut: Path, step: int) -> Path:
    """A copy of a run folder without what was written after a checkpoint, as if the job had been killed there."""
    later = {f"step_{s:08d}" for s in range(step + 1, 13)}
    for source in sorted(whole.rglob("*")):
        parts = source.relative_to(whole).parts
        if source.is_file() and not later & set(parts) and "model" not in parts:
            target = cut.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (cut / "config.yaml").write_text(
        (cut / "config.yaml").read_text().replace(f"name: {whole.name}", f"name: {cut.name}")
    )
    return cut


def what_was_logged(run: Path) -> list[list]:
    """Step and names of every line of metrics.jsonl: none twice, none missing."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], *sorted(row)] for row in rows]


def test_checkpoints_resume_at_another_stage_and_world_size(digits, tmp_path):
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "a", "train.num_steps=8")])
    more = ["train.num_steps=9", "prune.end_step=8", "parallel.ds_config=zero3_fp32"]
    before = named_state(tmp_path / "a/checkpoints/step_00000008")
    run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "a", *more)])
    assert losses(tmp_path / "a").keys() == set(range(1, 10))
    after = named_state(tmp_path / "a/checkpoints/step_00000009")
    assert before.keys() == after.keys()
    assert all(torch.isfinite(t).all() for t in after.values())


QUICK_SCORES = [(3, 2, 1), (1, 1, 1)]
ALL_SCORES = [(3, 4, 1), (1, 1, 1), (0, 2, 1), (1, 2, 1), (2, 2, 1), (0, 4, 2), (1, 4, 4)]


@pytest.mark.parametrize("topologies", [QUICK_SCORES, pytest.param(ALL_SCORES, marks=FULL)], ids=["quick", "all"])
def test_scores_are_equal_on_all_ranks_and_equal_to_brute_force(digits, tmp_path, topologies):
    run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "m", "prune.target_depth=null")])
    export, results = str(tmp_path / "m" / "model"), []
    for zero_stage, world_size, stages in topologies:
        arguments = {"export": export, "shards": f"{digits}/train", "zero_stage": zero_stage, "out": str(tmp_path)}
        arguments["stages"] = stages
        ranks = run_ranks("tests.workers.training:scores", world_size, **arguments)
        assert all(r == ranks[0] for r in ranks)
        assert ranks[0]["gathers"] == 4 * 3  # each block once per calibration batch
        assert ("the pruning decision" in ranks[0]["disagreement"]) is (world_size > 1)
        assert ("the order of removal" in ranks[0]["unsteady"]) is (world_size > 1)
        results.append(ranks[0])
    expected = brute_force(export, digits)
    for result in results:
        assert result["ntk"] == pytest.approx(results[1]["ntk"], rel=1e-8)
        assert result["zico"] == pytest.approx(results[1]["zico"], rel=1e-8)
        for criterion, by_block in results[1]["others"].items():  # magnitude, taylor, diff_pruning, learned
            for block, score in by_block.items():
                assert result["others"][criterion][block] == pytest.approx(score, rel=1e-8), criterion
        for criterion, by_block in expected.items():
            for block, value in by_block.items():
                assert result["scores"][criterion][block]["value"] == pytest.approx(value, rel=1e-10)


def brute_force(export: str, digits: str) -> dict[str, dict[str, float]]:
    """Leave-one-out by L + 1 whole forward passes in float64, in this one process."""
    from dataclasses import replace

    from entprune_ds.calibration import examples_of
    from entprune_ds.diffusion.objective import FlowObjective
    from entprune_ds.models.dit import DiT
    from tests.tiny import tiny_config

    model, facts = load_model(Path(export))
    config = tiny_config(1)
    config = replace(config, run=replace(config.run, seed=3), data=replace(config.data, shards=f"{digits}/train"))
    examples, outputs = examples_of(config, 0), {}
    batches = [examples("calibration", 32) for _ in range(3)]
    latents, labels = (torch.cat(c) for c in zip(*batches, strict=True))
    draws = FlowObjective().make_draws(latents, labels, range(96), seed=3, purpose="calibration", step=0)
    for dropped in [None, *facts["kept_blocks"]]:
        kept = tuple(b for b in facts["kept_blocks"] if b != dropped)
        architecture = {k: v for k, v in facts["model"].items() if k != "kept_blocks"}
        from entprune_ds.config import ModelConfig

        smaller = DiT(ModelConfig(**architecture, kept_blocks=kept)).double()
        names = {n for n, _ in smaller.named_parameters()}
        smaller.load_state_dict({n: p.double() for n, p in model.named_parameters() if n in names})
        with torch.no_grad():
            outputs[dropped] = smaller(draws.z_t.double(), draws.t, draws.labels)
    target, full = draws.target.double(), outputs[None]
    spread = full.std(0).log()
    result: dict[str, dict[str, float]] = {"signed_ced": {}, "ced": {}, "ced_abs": {}, "mse": {}, "loss": {}}
    for block in facts["kept_blocks"]:
        change = outputs[block].std(0).log() - spread
        result["signed_ced"][str(block)] = change.sum().item()
        result["ced"][str(block)] = abs(change.sum().item())
        result["ced_abs"][str(block)] = change.abs().sum().item()
        result["mse"][str(block)] = (outputs[block] - full).square().mean().item()
        rise = (outputs[block] - target).square().mean() - (full - target).square().mean()
        result["loss"][str(block)] = rise.item()
    return result


def test_the_newest_checkpoints_and_those_before_removals_are_kept(tmp_path):
    from entprune_ds.engine.checkpoint import prune_old, step_folders

    for name in [*(f"step_{step:08d}" for step in range(0, 100, 10)), "step_00000020_backup", "superseded_1"]:
        (tmp_path / name).mkdir()
    prune_old(tmp_path, keep_last=2, keep_steps={30, 60})
    assert [int(p.name[5:]) for p in step_folders(tmp_path)] == [30, 60, 80, 90]
    assert (tmp_path / "step_00000020_backup").is_dir() and (tmp_path / "superseded_1").is_dir()


def test_a_damaged_checkpoint_is_passed_over_and_never_silently_restarted(digits, tmp_path, capsys):
    from entprune_ds import comm
    from entprune_ds.engine.checkpoint import find_checkpoint

    run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "a", "train.num_steps=8")])
    root, warnings = tmp_path / "a" / "checkpoints", []
    newest = find_checkpoint(root, warnings.append)
    assert (newest.step, warnings) == (8, [])
    data = (newest.folder / "rank_00000.safetensors").read_bytes()
    (newest.folder / "rank_00000.safetensors").write_bytes(data[:-1])  # truncated
    assert find_checkpoint(root, warnings.append).step == 4
    assert "step_00000008 is damaged" in warnings[0]
    (newest.folder / "rank_00000.safetensors").write_bytes(data)
    for change, found in (
        ({"adam_step": 80}, 4),
        ({"format": 9}, 4),
        ({"sha256": None}, 4),
        ({}, 8),
    ):  # as written, it counts again
        (newest.folder / "manifest.json").write_text(json.dumps(newest.manifest | change))
        assert find_checkpoint(root, warnings.append).step == found, change
    assert ["manifest.json has the checksum" in text for text in warnings] == [False, True, True, True]
    unsigned = {key: value for key, value in newest.manifest.items() if key != "sha256"}  # by an older version
    (newest.folder / "manifest.json").write_text(json.dumps(unsigned))
    assert find_checkpoint(root, warnings.append).step == 8
    for folder in root.glob("step_*"):
        path = folder / "rank_00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # a flipped bit, same size
        path.write_bytes(data)
    with pytest.raises(comm.DistributedError, match="none of the 3 checkpoints"):
        find_checkpoint(root, warnings.append)


def test_pictures_that_cannot_be_written_do_not_end_the_training(digits, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "samples").write_text("a file where the folder of pictures should be")
    more = ["train.num_steps=4", "prune.end_step=4", "monitor.sample_every=2"]
    assert run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "a", *more)]) == [[0]]
    assert (tmp_path / "a" / "model" / "config.json").is_file()
