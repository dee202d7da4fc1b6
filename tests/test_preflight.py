"""What is refused before a process group exists: shards, DeepSpeed configuration, batch, weights, run folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from entprune_ds.cli import train
from entprune_ds.config import ConfigError, load_config, to_yaml
from entprune_ds.engine.ds_config import (
    SHIPPED,
    batch_plan,
    find_ds_config,
    full_ds_config,
    read_ds_config,
    zero_stage,
)
from entprune_ds.interop.safetensors import save_model
from entprune_ds.models.dit import DiT
from entprune_ds.preflight import training_problems, validation_spec
from tests.test_interop import edit_weights
from tests.tiny import tiny_config

DS_CONFIGS = sorted(path.stem for path in SHIPPED[0].glob("*.json"))


@pytest.fixture
def shards(digits, tmp_path) -> Path:
    """A copy of the digits that may be damaged: train/ with 24 shards, val/ with 5."""
    shutil.copytree(digits, tmp_path / "data")
    return tmp_path / "data"


SETTINGS = """
    model.depth=8 model.hidden_size=32 model.num_heads=4 model.input_size=8 model.in_channels=1 model.num_classes=10
    train.num_steps=1200 train.global_batch_size=128 train.learning_rate=0.001 train.lr_schedule=cosine
    parallel.ds_config=zero1_fp32 prune.criterion=loss data.num_readers=4
"""


class Job:
    """A command line whose problems are asked for."""

    def __init__(self, shards: str, root: Path):
        self.words = [*SETTINGS.split(), f"data.shards={shards}/train", f"run.root={root}", "run.name=job"]
        self.folder = root / "job"

    def problems(self, *more: str) -> list[str]:
        """Problems of the training with these settings added."""
        try:
            load_config([*self.words, *more], check=training_problems)
        except ConfigError as error:
            return error.problems
        return []

    def start(self, *more: str) -> None:
        """Leave the run folder as a training with these settings does after its first checkpoint."""
        (self.folder / "checkpoints" / "step_00000004").mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints" / "latest").write_text("step_00000004")
        (self.folder / "config.yaml").write_text(to_yaml(load_config([*self.words, *more])))


@pytest.fixture
def job(digits, tmp_path, monkeypatch) -> Job:
    """A small model on whole shards."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Job(digits, tmp_path / "runs")


@pytest.fixture
def damaged(shards, tmp_path) -> Job:
    """The same on shards that the test damages."""
    return Job(str(shards), tmp_path / "runs")


def test_a_good_job_has_no_problem_and_touches_nothing(job):
    assert job.problems() == []
    assert job.problems("prune.target_depth=4", "data.num_readers=2") == []
    assert not job.folder.exists()


def test_impossible_settings_are_reported_before_files_are_looked_at(job):
    found = job.problems("train.num_steps=0", "data.shards=/nowhere", "parallel.ds_config=/nowhere")
    assert found == ["`train.num_steps` must be above 0, got 0."]


def test_problems_of_all_kinds_come_at_once(job, tmp_path):
    found = job.problems(
        "data.shards=/nowhere", "parallel.ds_config=zero9", f"model.weights={tmp_path}", "train.micro_batch_size=3"
    )
    assert len(found) == 4
    for key in ("`data.shards`", "`parallel.ds_config`", "`model.weights`", "`train.micro_batch_size`"):
        assert sum(text.startswith(key) for text in found) == 1


# ---------------------------------------------------------------- data


def test_shards_must_be_named(job):
    [text] = job.problems("data.shards=")
    assert text.startswith("`data.shards` is empty. Give a folder")


def test_folders_without_an_index_are_refused(job, digits, tmp_path):
    [text] = job.problems(f"data.shards={tmp_path}")
    assert text.startswith("`data.shards`: ") and str(tmp_path / "index.json") in text
    [text] = job.problems(f"data.shards={digits}")
    assert f"Did you mean {digits}/train?" in text
    [text] = job.problems("data.val_shards=/nowhere")
    assert text.startswith("`data.val_shards`: ") and "/nowhere" in text


def test_every_missing_truncated_or_changed_shard_is_named(damaged, shards):
    names = [shards / "train" / f"shard-{i:06d}.tar" for i in range(3)] + [shards / "val" / "shard-000001.tar"]
    names[0].unlink()
    names[1].write_bytes(names[1].read_bytes()[:-512])
    content = bytearray(names[2].read_bytes())
    content[len(content) // 2] ^= 1
    names[2].write_bytes(content)
    names[3].unlink()
    found = damaged.problems()
    assert len(found) == 4
    for text, path, what in zip(found, names, ("is missing", "is truncated", "SHA-256", "is missing"), strict=True):
        assert str(path) in text and what in text


def test_checksums_are_left_to_rank_0_and_to_small_data(damaged, shards, monkeypatch):
    path = shards / "train" / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert len(damaged.problems()) == 1
    monkeypatch.setattr("entprune_ds.preflight.CHECKSUM_LIMIT", 1000)
    assert damaged.problems() == []
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    assert damaged.problems() == []


def test_examples_must_have_the_shape_and_the_classes_of_the_model(job, digits):
    found = job.problems("model.input_size=16", "model.num_classes=9")
    shape = "holds examples of shape [1, 8, 8], but the model takes [1, 16, 16]."
    classes = "has 10 classes, but `model.num_classes` is 9."
    for key, folder in (("data.shards", "train"), ("data.val_shards", "val")):
        assert any(t.startswith(f"`{key}`: {digits}/{folder} {shape}") for t in found)
        assert any(t.startswith(f"`{key}`: {digits}/{folder} {classes}") for t in found)
    assert len(found) == 4
    assert job.problems("model.num_classes=11") == []
    assert len(job.problems("model.in_channels=4")) == 2


def test_there_must_be_a_shard_for_every_reader(job, digits):
    count = len(list(Path(digits, "train").glob("*.tar")))
    assert count == 24
    words = ["train.global_batch_size=600", "train.micro_batch_size=null"]
    assert job.problems(*words, "data.num_readers=24") == []
    [text] = job.problems(*words, "data.num_readers=25")
    assert text.startswith("`data.num_readers` (25) is more than the 24 shards in ")
    [text] = job.problems(f"data.shards={digits}/train/shard-{{000000..000002}}.tar")
    assert "`data.num_readers` (4) is more than the 3 shards" in text
    [text] = job.problems(*words, "data.num_readers=24", "data.flip=true")
    assert text.startswith("`data.flip` needs shards of pixels or moments, but ")


def test_validation_shards_are_those_beside_the_training_shards(job, digits, shards):
    config = load_config(job.words)
    assert validation_spec(config) == f"{digits}/val"
    other = replace(config, data=replace(config.data, val_shards="/elsewhere"))
    assert validation_spec(other) == "/elsewhere"
    shutil.rmtree(shards / "val")
    config = replace(config, data=replace(config.data, shards=str(shards / "train")))
    assert validation_spec(config) == "" and training_problems(config) == []


# ---------------------------------------------------------------- ranks and batch


READERS = "the data-parallel size (8) must divide `data.num_readers` (4). Set data.num_readers to a multiple of 8 that "
BATCH = "`train.global_batch_size` (128) must be a multiple of the data-parallel size (3). Change it, or the number of "


@pytest.mark.parametrize(
    ("world_size", "told"), [(1, []), (2, []), (4, []), (3, [f"{BATCH}ranks."]), (8, [f"{READERS}divides 128."])]
)
def test_the_number_of_ranks_must_divide_batch_and_readers(job, monkeypatch, world_size, told):
    """The batch first: no number of readers helps where it does not fit."""
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert job.problems() == told


def test_the_micro_batch_must_divide_the_share_of_a_rank(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert job.problems("train.micro_batch_size=16") == []
    [text] = job.problems("train.micro_batch_size=24")
    assert text.startswith("`train.micro_batch_size` (24) must divide ") and "(128 / 4 = 32)" in text
    assert len(job.problems("train.micro_batch_size=64")) == 1


def test_every_rank_needs_a_draw(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    few = ["prune.target_depth=4", "score.batch_size=3", "score.draws=6", "train.validation_draws=3"]
    found = job.problems(*few)
    assert [t.split("`")[1] for t in found] == ["score.batch_size", "train.validation_draws"]
    assert all("the number of ranks (4)" in t for t in found)
    assert [t.split("`")[1] for t in job.problems(*few[1:])] == ["train.validation_draws"]  # nothing is pruned
    enough = ["score.batch_size=4", "score.draws=8", "train.validation_draws=4"]
    assert job.problems("prune.target_depth=4", *enough) == []


def test_the_batch_plan_multiplies_out_to_the_global_batch():
    config = tiny_config()
    for micro in (None, 1, 2, 4):
        for dp_size in (1, 2):
            plan = batch_plan(replace(config, train=replace(config.train, micro_batch_size=micro)), dp_size)
            assert plan[0] * plan[1] * dp_size == config.train.global_batch_size
            assert micro is None or plan[0] == micro
    with pytest.raises(ValueError, match=r"\(6\) must be a multiple of the data-parallel size \(4\)"):
        batch_plan(replace(config, train=replace(config.train, global_batch_size=6)), 4)


# ---------------------------------------------------------------- DeepSpeed configuration


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_every_shipped_configuration_is_accepted(job, name):
    assert job.problems(f"parallel.ds_config={name}") == []
    config = load_config([*job.words, f"parallel.ds_config={name}"])
    assert f"zero{zero_stage(config)}_" in name
    assert read_ds_config(config).get("bf16", {}).get("enabled", False) == (not name.endswith("fp32"))
    full = full_ds_config(config, dp_size=2)
    assert (full["train_batch_size"], full["train_micro_batch_size_per_gpu"]) == (128, 64)
    assert full["gradient_accumulation_steps"] == 1 and full["gradient_clipping"] == 1.0


def test_the_shipped_configurations_are_all_there():
    expected = [f"zero{s}_{d}" for s in range(4) for d in ("bf16", "fp32")] + ["zero2_offload", "zero3_offload"]
    assert sorted(expected) == DS_CONFIGS


def test_the_stage_may_be_overruled_but_stage_0_neither_accumulates_in_fp32_nor_offloads(job, tmp_path):
    config = load_config([*job.words, "parallel.ds_config=zero1_fp32", "parallel.zero_stage=3"])
    assert zero_stage(config) == 3
    assert job.problems("parallel.ds_config=zero1_fp32", "parallel.zero_stage=0") == []
    for name in [n for n in DS_CONFIGS if not n.endswith("fp32") and n != "zero0_bf16"]:
        [text] = job.problems(f"parallel.ds_config={name}", "parallel.zero_stage=0")
        assert "accumulates bf16 gradients in fp32, which DeepSpeed cannot do at ZeRO stage 0" in text
    with open(path := tmp_path / "ds.json", "w") as file:
        file.write('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    [text] = job.problems(f"parallel.ds_config={path}")
    assert "offloads the optimizer, which needs ZeRO stage 1, 2 or 3" in text


@pytest.mark.parametrize("name", ["zero9", "zero1_bf16.json", "/nowhere/ds.json", "../ds_configs", "presets"])
def test_an_unknown_configuration_is_refused_with_the_known_names(job, name):
    [text] = job.problems(f"parallel.ds_config={name}")
    assert f"`parallel.ds_config`: `{name}` is neither a file nor one of {', '.join(DS_CONFIGS)}." == text
    with pytest.raises(ValueError, match="neither a file"):
        find_ds_config(name)


def test_a_folder_is_no_configuration(job, tmp_path):
    [text] = job.problems(f"parallel.ds_config={tmp_path}")
    assert "is neither a file nor one of" in text


REFUSED = {
    '{"train_batch_size": 4}': "sets train_batch_size, which train.* and monitor.* own",
    '{"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 2}': "own. Remove them.",
    '{"gradient_clipping": 1, "optimizer": {}, "scheduler": {}}': "gradient_clipping, optimizer, scheduler",
    '{"wandb": {"enabled": true}, "steps_per_print": 5}': "wandb, steps_per_print",
    '{"fp16": {"enabled": true}}': "enables fp16, which is not supported",
    '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}': "other places are not supported",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}': "offloads parameters, which is not",
    '{"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}}': "cannot do at ZeRO stage 0",
    "[1]": "must hold a JSON object", "3": "must hold a JSON object", "null": "must hold a JSON object",
    "{": "is not valid JSON", "": "is not valid JSON", "{'stage': 1}": "is not valid JSON",
}  # fmt: skip


@pytest.mark.parametrize("content", REFUSED)
def test_a_configuration_that_cannot_be_used_is_refused(job, tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    [text] = job.problems(f"parallel.ds_config={path}")
    assert REFUSED[content] in text and text.startswith("`parallel.")


@pytest.mark.parametrize(
    "content",
    [
        b'{"zero_optimization": null}', b'{"zero_optimization": 3}', b'{"bf16": true}', b'{"fp16": true}',
        b'{"zero_optimization": {"stage": 7}}', b'{"zero_optimization": {"stage": "auto"}}',
        b'{"zero_optimization": {"stage": null}}', b'{"bfloat16": {"enabled": true}}',
        b'{"zero_optimization": {"stage": 2, "cpu_offload": true}}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_configuration_of_the_wrong_form_is_refused_with_the_file(job, tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    [text] = job.problems(f"parallel.ds_config={path}")
    assert text.startswith("`parallel.")
    assert str(path) in text


def test_a_configuration_of_ones_own_is_accepted(job, tmp_path):
    path = tmp_path / "ds.json"
    for content in ("{}", '{"zero_optimization": {"stage": 2, "overlap_comm": true}}', '{"fp16": {"enabled": false}}'):
        path.write_text(content)
        assert job.problems(f"parallel.ds_config={path}") == []


# ---------------------------------------------------------------- weights


@pytest.fixture
def weights(job, tmp_path) -> Path:
    """An export of the model of the job without blocks 1 and 5."""
    config = replace(load_config(job.words).model, kept_blocks=(0, 2, 3, 4, 6, 7))
    model = DiT(config)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    return save_model(tmp_path / "export", tensors, tensors.__getitem__, config, {"step": 1, "weights": "raw"})


KEPT = "model.kept_blocks=[0,2,3,4,6,7]"


def test_weights_of_the_same_architecture_are_accepted(job, weights):
    assert job.problems(f"model.weights={weights}", KEPT) == []
    assert job.problems(f"model.weights={weights}", "model.kept_blocks=[0,2,7]") == []
    assert job.problems(f"model.weights={weights}", KEPT, "prune.target_depth=5") == []


def test_weights_that_predict_something_else_are_refused(job, weights):
    facts = json.loads((weights / "config.json").read_text())
    facts["diffusion"] = {"path": "vp", "prediction": "noise", "loss_weight": "velocity"}
    (weights / "config.json").write_text(json.dumps(facts))
    found = job.problems(f"model.weights={weights}", KEPT)
    assert found == [
        f"`diffusion.path` is linear, but {weights} was trained with vp. Set that value.",
        f"`diffusion.prediction` is velocity, but {weights} was trained with noise. Set that value.",
    ]
    assert job.problems(f"model.weights={weights}", KEPT, "diffusion.path=vp", "diffusion.prediction=noise") == []


def test_weights_of_another_architecture_are_refused_with_both_values(job, weights):
    found = job.problems(f"model.weights={weights}", "model.depth=9", "model.num_heads=2")
    assert found == [
        f"`model.depth` is 9, but `model.weights` ({weights}) has 8. Make them equal.",
        f"`model.num_heads` is 2, but `model.weights` ({weights}) has 4. Make them equal.",
    ]


def test_weights_without_the_blocks_of_the_job_are_refused_with_the_remedy(job, weights):
    remedy = "Set model.kept_blocks=[0, 2, 3, 4, 6, 7], or a part of them."
    [text] = job.problems(f"model.weights={weights}")
    assert text == f"`model.weights` ({weights}) no longer has blocks [1, 5]. {remedy}"
    [text] = job.problems(f"model.weights={weights}", "model.kept_blocks=[0,1]")
    assert "no longer has blocks [1]. " in text and text.endswith(remedy)


def test_weights_that_are_not_there_are_refused(job, tmp_path):
    [text] = job.problems(f"model.weights={tmp_path / 'nowhere'}")
    assert text.startswith("`model.weights`: ") and "is not an exported model" in text


def test_damaged_weights_are_refused(job, weights):
    content = (weights / "model.safetensors").read_bytes()
    (weights / "model.safetensors").write_bytes(content[:-100])
    [text] = job.problems(f"model.weights={weights}", KEPT)
    assert text.startswith("`model.weights`: ") and "model.safetensors" in text


def test_weights_without_a_parameter_are_refused(job, weights):
    edit_weights(weights, lambda tensors: tensors.pop("blocks.2.attn.qkv.weight"))
    [text] = job.problems(f"model.weights={weights}", KEPT)
    assert "missing blocks.2.attn.qkv.weight" in text


def test_a_job_that_resumes_does_not_need_its_first_weights(job, weights):
    words = [f"model.weights={weights}", KEPT, "prune.target_depth=4", "prune.criterion=ced"]
    job.start(*words)
    shutil.rmtree(weights)
    assert job.problems(*words) == []
    shutil.rmtree(job.folder)
    assert len(job.problems(*words)) == 1


@pytest.mark.parametrize("criterion", ["ced", "ced_abs"])
def test_entropies_of_an_untrained_model_are_refused(job, weights, criterion):
    words = ["prune.target_depth=4", f"prune.criterion={criterion}"]
    [text] = job.problems(*words)
    assert text.startswith(f"`prune.criterion` {criterion} cannot score an untrained model at step 0.")
    assert job.problems(*words, "prune.start_step=1") == []
    assert job.problems(*words, f"model.weights={weights}", KEPT) == []
    assert job.problems(*words[:1], "prune.criterion=random") == job.problems(*words[1:]) == []
    job.start(*words)
    assert job.problems(*words) == []  # a resumed model is trained


# ---------------------------------------------------------------- --dry-run


def test_a_dry_run_describes_data_and_weights_and_writes_nothing(job, weights, capsys):
    assert train.main([*job.words, f"model.weights={weights}", KEPT, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    data = job.words[-3].removeprefix("data.shards=")
    assert f"# data: 1,500 examples in 24 shards, 10 classes, latents of shape 1x8x8: {data}" in lines
    assert f"# weights: sit, patch 2, width 32, 4 heads, depth 6 of 8, step 1, raw: {weights}" in lines
    assert "# ZeRO-1, 1 rank(s) x micro-batch 128 x accumulation 1" in lines and not job.folder.exists()
    assert train.main([*job.words, "data.shards=", "--dry-run"]) == 0  # settings alone, before there is any data
    text = capsys.readouterr().out
    assert "# data: none given yet" in text and "# weights: random, seed 0" in text
    job.start()
    assert train.main([*job.words, "--dry-run"]) == 0
    assert f"# weights: {job.folder} goes on from step_00000004" in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_start_refuses_with_all_problems(damaged, shards, weights, capsys):
    (shards / "train" / "shard-000001.tar").unlink()
    edit_weights(weights, lambda tensors: tensors.pop("blocks.2.attn.qkv.weight"))
    words = [f"model.weights={weights}", KEPT, "parallel.ds_config=zero9"]
    found = damaged.problems(*words)
    assert len(found) == 3
    for more in (["--dry-run"], []):  # the second is a start
        assert train.main([*damaged.words, *words, *more]) == 2
        printed = capsys.readouterr()
        assert printed.err.splitlines() == [f"error: {text}" for text in found] and printed.out == ""


# ---------------------------------------------------------------- the run folder


def test_the_same_command_is_a_resume(job):
    job.start("prune.target_depth=4")
    assert job.problems("prune.target_depth=4") == []


CHANGES = [
    "parallel.ds_config=zero3_fp32", "parallel.zero_stage=2", "monitor.log_every=3", "monitor.wandb=false",
    "monitor.sample_every=7", "train.num_steps=1300", "train.micro_batch_size=32", "train.checkpoint_every=10",
    "train.keep_checkpoints=9", "train.validate_every=10", "run.timeout_seconds=9", "sample.num_steps=5",
    "evaluate.latency_repeats=3",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_change_the_training_may_change_on_resume(job, change):
    job.start()
    assert job.problems(change) == []


def test_data_and_weights_and_the_run_itself_may_move_on_resume(job, digits, shards, weights, tmp_path):
    job.start(KEPT)
    moved = [f"data.shards={shards}/train", f"data.val_shards={digits}/val", "data.shard_size=7"]
    assert job.problems(KEPT, f"model.weights={weights}", *moved) == []
    shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere")
    assert job.problems(KEPT, f"run.root={tmp_path / 'elsewhere'}") == []
    assert len(job.problems(f"run.root={tmp_path / 'elsewhere'}")) == 1  # it is that run, which has other blocks


FIXED = {
    "model.depth=7": "8", "model.num_heads=2": "4", "model.num_classes=11": "10", "run.seed=1": "0",
    "data.num_readers=2": "4", "data.shuffle_buffer=9": "1024", "train.global_batch_size=64": "128",
    "train.learning_rate=0.5": "0.001", "train.lr_schedule=constant": "cosine", "train.betas=[0.9,0.9]": "[0.9, 0.999]",
    "train.ema_decay=0.5": "0.9999", "train.label_dropout=0.2": "0.1", "train.grad_clip=2": "1.0",
    "prune.target_depth=3": "None", "prune.criterion=random": "loss", "score.draws=2048": "1024",
    "prune.score_only=true": "False",
}  # fmt: skip


@pytest.mark.parametrize("change", FIXED)
def test_what_decides_the_training_must_match_on_resume_and_both_values_are_listed(job, change):
    job.start()
    key, _, value = change.partition("=")
    [text] = job.problems(change)
    assert text.startswith(f"`{key}` is ") and f"{job.folder} was started with {FIXED[change]}. " in text
    assert value.lower().replace(",", ", ") in text.lower() and "choose another `run.name`" in text


def test_all_differences_from_the_run_folder_are_listed(job):
    job.start()
    assert len(job.problems("model.depth=7", "run.seed=1", "train.learning_rate=0.5")) == 3


def test_a_resume_may_only_raise_the_number_of_steps(job):
    job.start()
    [text] = job.problems("train.num_steps=1199")
    assert (
        text.startswith("`train.num_steps` is 1199, but ")
        and "was started with 1200. A resume may only raise it." in text
    )
    assert job.problems("train.num_steps=1200") == job.problems("train.num_steps=5000") == []


def test_more_steps_must_not_move_the_pruning_checks(job):
    prune = ["prune.target_depth=4"]
    job.start(*prune)
    [text] = job.problems(*prune, "train.num_steps=1300")
    assert "raised from 1200 to 1300, which would move the pruning checks" in text
    job.start(*prune, "prune.end_step=800")
    assert job.problems(*prune, "prune.end_step=800", "train.num_steps=1300") == []


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"a: [", b"model: {deepth: 3}", b"model: {depth: x}", b"\xff\xfe", b"hello"]
)
def test_a_damaged_run_folder_is_refused_by_name(job, content):
    job.start()
    (job.folder / "config.yaml").write_bytes(content)
    [text] = job.problems()
    assert str(job.folder / "config.yaml") in text and "choose another `run.name`" in text


def test_a_run_folder_without_a_checkpoint_is_a_new_run(job):
    job.start()
    assert len(job.problems("run.seed=1")) == 1
    shutil.rmtree(job.folder / "checkpoints")
    assert job.problems("run.seed=1") == []
    (job.folder / "config.yaml").unlink()
    assert job.problems("run.seed=1") == []


def test_the_presets_that_ship_fit_the_digits(digits, tmp_path):
    for name in ("digits", "digits_prune"):
        words = [f"preset={name}", f"data.shards={digits}/train", f"run.root={tmp_path}", "prune.criterion=loss"]
        load_config(words, check=training_problems)
