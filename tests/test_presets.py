"""The presets of the paper's work: each a dry run for both targets, each shipped, and `base` without surprises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entprune_ds.cli import train
from entprune_ds.config import PRESETS, ConfigError, load_config
from tests.ranks import ROOT

CLASSES = {"imagenet256": 1000, "cub": 200, "flowers": 102, "artbench": 10}
PAPER = [f"{model}_xl2_{data}" for model in ("dit", "sit") for data in CLASSES]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(list(words))
    (problem,) = refused.value.problems
    return problem


@pytest.mark.parametrize("depth", [20, 14])
@pytest.mark.parametrize("preset", PAPER)
def test_a_preset_of_the_paper_is_dry_run_for_both_targets(preset, depth, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = [f"preset={preset}", f"prune.target_depth={depth}", "prune.start_step=100", "--dry-run"]
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    model, data = preset.split("_xl2_")
    config = load_config(words[:-1])
    assert config.model.process == model and config.model.num_classes == CLASSES[data]
    assert (config.model.depth, config.model.hidden_size, config.model.num_heads) == (28, 1152, 16)
    assert f"  num_classes: {CLASSES[data]}\n" in printed and f"  target_depth: {depth}\n" in printed
    most = -(-2 * (28 - depth) // 4)
    assert f"each removes at most {most} of 28 blocks" in printed and "# ZeRO-1, 8 rank(s) x micro-batch 32" in printed
    recipe = config.train
    assert (recipe.learning_rate, recipe.min_learning_rate, recipe.lr_schedule) == (2e-4, 1e-4, "cosine")
    assert (recipe.global_batch_size, recipe.ema_decay, recipe.grad_clip, recipe.weight_decay) == (256, 0.9999, 1, 0)
    assert (config.prune.num_checks, config.sample.num_samples, config.sample.cfg_scale) == (4, 50_000, 1.5)
    assert config.prune.end_step is not None and config.prune.end_step < recipe.num_steps


def test_the_package_holds_every_preset(tmp_path):
    """What `pip install .` would copy, without the editable shortcut of the tests."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = {p.name for p in (tmp_path / "entprune_ds" / "presets").glob("*.yaml")}
    assert built == {p.name for p in PRESETS.glob("*.yaml")} >= {f"{name}.yaml" for name in PAPER}


def test_a_base_lies_below_the_preset_that_names_it_section_by_section(tmp_path):
    (tmp_path / "below.yaml").write_text("base: digits\ntrain: {num_steps: 7, warmup_steps: 3}\nrun: {name: below}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\ntrain: {num_steps: 9}\n")
    config = load_config([f"preset={tmp_path / 'above.yaml'}", "train.ema_decay=0.5"])
    assert (config.train.num_steps, config.train.warmup_steps, config.run.name) == (9, 3, "below")
    assert (config.model.depth, config.train.learning_rate, config.train.ema_decay) == (8, 2e-3, 0.5)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("base: a.yaml", "leads back to it"), ("base: ../d/a.yaml", "or too many"),
        ("base: nowhere", "preset `nowhere` does not exist"),
        ("base: [digits]", "`base` must name a preset, got ['digits']"),
        ("base: 3", "`base` must name a preset, got 3"),
        ("base: evil.yaml", "sets `prune.criterion` to a file"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_used_is_one_problem(tmp_path, base, told):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.yaml").write_text(base)
    (folder / "evil.yaml").write_text("prune: {criterion: mine.py}")
    assert told in refusal(f"preset={folder / 'a.yaml'}")
    assert "`base` is not a setting" in refusal("base=digits")


def test_no_preset_repeats_what_its_base_says():
    for path in sorted(Path(PRESETS).glob("*_xl2_*.yaml")):
        lines = [line for line in path.read_text().splitlines() if line.startswith("base: ")]
        assert lines or path.stem.endswith("_256"), path
