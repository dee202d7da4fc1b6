"""Distillation: the loss, its gradient and the sharded teacher against plain references; refusals; exact resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from entprune_ds.config import Config, DistillConfig, ModelConfig, SoftConfig, TrainConfig
from entprune_ds.diffusion.objective import FlowObjective, build_objective
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.models.dit import DiT
from entprune_ds.recovery import FeatureTap, Terms, feature_weight, masked_difference
from entprune_ds.teacher import Teacher, first_step, matching
from tests.ranks import run_ranks
from tests.reference import distill as reference
from tests.test_training import FULL, cut_after, equal_state, losses, what_was_logged, words
from tests.tiny import MODEL, load_model, tiny_config, tiny_draws
from tests.workers.resize_cost import Made


def random_source(model: ModelConfig, seed: int = 0) -> Source:
    """A model whose every parameter matters: none is zero, as they are in a fresh one."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in Source(model, dict.__getitem__, {}).shapes.items():  # type: ignore[arg-type]
        weights[name] = torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.05)
    facts = {"weights": "ema", "step": 7, "diffusion": {"path": "linear", "prediction": "velocity"}}
    return Source(model, weights.__getitem__, facts)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """An export of the tiny model."""
    return str(write_export(tmp_path_factory.mktemp("teacher"), random_source(MODEL)))


def test_a_block_is_matched_with_the_last_one_that_it_stands_for():
    assert matching((0, 2, 3), (0, 1, 2, 3)) == {0: 1, 2: 2, 3: 3}
    assert matching((0, 1), tuple(range(12))) == {0: 0, 1: 11}
    assert matching((3, 9), tuple(range(12))) == {3: 8, 9: 11}
    assert matching((0, 6, 7), (0, 2, 5, 6, 7, 11)) == {0: 5, 6: 6, 7: 11}  # a teacher without some blocks itself
    every_other = tuple(range(1, 28, 2))
    assert matching(tuple(b - 1 for b in every_other), tuple(range(28))) == {b - 1: b for b in every_other}
    for kept in ((0, 2, 3), (1, 4), (5,), (0, 1, 2, 3, 4, 5)):
        teacher = list(range(6))
        assert matching(kept, teacher) == {b: reference.matched_block(b, list(kept), teacher) for b in kept}


def test_elements_beyond_two_sigma_of_either_net_are_left_out():
    student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    student[0, 2, 3], teacher[1, 4, 6] = 50.0, -40.0  # examples of their own: the other's statistics must not matter
    found = masked_difference(student, teacher, 2.0)
    assert found[0, 2, 3] == 0 and found[1, 4, 6] == 0 and 0 < found.count_nonzero() < 3 * 5 * 7 - 2
    for n in range(3):
        loss = reference.feature_loss(student[n], teacher[n], 2.0)
        assert found[n].square().mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(masked_difference(student, teacher, 1e9), student - teacher)
    assert masked_difference(student, student, 2.0).count_nonzero() == 0


def test_the_weight_of_the_features_falls_linearly_over_the_steps_with_the_teacher():
    config = Config(train=TrainConfig(num_steps=100), distill=DistillConfig(kind="features", feature_weight=0.5))
    assert [feature_weight(config, s, 20) for s in (20, 60, 99)] == pytest.approx([0.5, 0.25, 0.5 / 80])
    for process, first in (("dit", 1e-2), ("sit", 2e-4)):
        model, distill = ModelConfig(process=process), DistillConfig(kind="features")
        assert feature_weight(replace(config, model=model, distill=distill), 20, 20) == first


def test_the_teacher_sets_in_at_the_first_removal_or_where_it_is_told_to():
    config, whole = tiny_config(), MODEL
    assert first_step(config, whole, []) is None and first_step(config, whole, [5, 9]) == 5
    assert first_step(replace(config, model=MODEL.keeping((0, 2))), whole, [5]) == 0  # starts with fewer blocks
    narrow = replace(MODEL, block_widths=((1, 1, 64),))
    assert first_step(replace(config, model=narrow), whole, []) == 0
    assert first_step(replace(config, distill=DistillConfig(start=3)), whole, [5]) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_injected_gradient_is_that_of_the_summed_loss(checkpointing):
    kept, count = (0, 2), 2
    source = random_source(MODEL)
    config = replace(MODEL.keeping(kept), activation_checkpointing=checkpointing)
    student = DiT(config).double()
    other = random_source(MODEL, seed=1)
    student.load_state_dict({n: other.read(n) for n, _ in student.named_parameters()})
    draws = tiny_draws(tiny_config(), 0, 0, 1)
    terms = Terms(DistillConfig(kind="features"), FlowObjective(), count, len(kept), beta=0.7)
    made = Teacher(source, torch.float64, sharded=True)
    lessons = made.outputs(draws.split(4), matching(kept, MODEL.blocks), True)
    student.tap = FeatureTap(terms, [lesson.features for lesson in lessons])
    terms.sums = terms.sums.double()
    parts = [part.to(torch.device("cpu"), torch.float64) for part in draws.split(4)]
    predictions = [student(part.z_t, part.t, part.labels) for part in parts]  # both forward passes first, as pipelines
    for part, lesson, prediction in zip(parts, lessons, predictions, strict=True):
        (terms.loss(prediction, part.target, part.t, lesson.prediction).mean() / count).backward()

    plain_student, plain_teacher = DiT(MODEL.keeping(kept)).double(), DiT(MODEL).double()
    plain_student.load_state_dict({n: other.read(n) for n, _ in student.named_parameters()})
    plain_teacher.load_state_dict({n: source.read(n) for n in source.shapes})
    whole = (draws.z_t.double(), draws.t.double(), draws.labels, draws.target.double())
    plain, output, features = reference.terms(plain_student, list(kept), plain_teacher, [0, 1, 2, 3], whole, 2.0)
    (0.1 * plain + 0.9 * output + 0.7 * features).backward()
    assert terms.sums.tolist() == pytest.approx([plain.item(), output.item(), features.item()], rel=1e-12)
    for (name, p), q in zip(student.named_parameters(), plain_student.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("process", ["sit velocity", "sit score", "sit noise", "dit"])
def test_the_distance_from_an_equal_prediction_is_zero_and_has_no_gradient(process):
    name, _, prediction = process.partition(" ")
    model = replace(MODEL, process=name, learn_sigma=name == "dit")
    config = tiny_config()
    diffusion = replace(config.diffusion, prediction=prediction or "velocity", path="vp" if prediction else "linear")
    objective = build_objective(model, diffusion)
    draws = objective.make_draws(torch.randn(6, 1, 4, 4), torch.zeros(6).long(), range(6), seed=0, purpose="x", step=0)
    wanted = torch.randn(6, model.out_channels, 4, 4).double()
    ours = wanted.clone().requires_grad_()
    loss = objective.output_loss(ours, wanted, draws.t)
    loss.sum().backward()
    assert loss.shape == (6,) and loss.abs().max() < 1e-14 and ours.grad.abs().max() < 1e-14
    assert (objective.output_loss(wanted + 0.1, wanted, draws.t) > 0).all()


def test_the_distance_of_a_diffusion_model_has_the_divergence_of_its_steps():
    from entprune_ds.diffusion.ddpm import full_chain

    objective = build_objective(replace(MODEL, process="dit", learn_sigma=True), tiny_config().diffusion)
    generator = torch.Generator().manual_seed(0)
    ours, wanted = torch.randn(2, 1, 2, 1, 1, generator=generator).double()
    table = full_chain(torch.device("cpu"), torch.float64)
    for timestep in (0, 1, 500, 999):
        steps = []
        for epsilon, logits in (ours.flatten(), wanted.flatten()):
            share = (logits + 1) / 2
            log_var = share * table.log_beta[timestep] + (1 - share) * table.log_posterior[timestep]
            data = -table.noise_ratio[timestep] * epsilon  # of z_t = 0
            steps.append(torch.distributions.Normal(table.data_factor[timestep] * data, (log_var / 2).exp()))
        bits = torch.distributions.kl_divergence(steps[1], steps[0]) / math.log(2)
        expected = (ours[0, 0] - wanted[0, 0]).square().item() + bits.item()
        found = objective.output_loss(ours, wanted, torch.tensor([float(timestep)]))
        assert found.item() == pytest.approx(expected, rel=1e-9)
    ours.requires_grad_()
    objective.output_loss(ours, wanted, torch.tensor([500.0])).sum().backward()
    assert ours.grad[0, 0].item() == pytest.approx(2 * (ours - wanted)[0, 0].item(), rel=1e-9)  # detached in the KL


PLAN = [(2, [0, 1, 2, 3]), (3, [0, 2, 3]), (2, [0, 2])]


def expected(teacher: str, plan: list, start: int) -> tuple[list, DiT]:
    """The same training in this one process."""
    model, _ = load_model(Path(teacher))
    student, _ = load_model(Path(teacher))
    student.requires_grad_()
    config = tiny_config()
    kept_at = [kept for count, kept in plan for _ in range(count)]
    batches = []
    for step in range(len(kept_at)):
        draws = tiny_draws(config, step, 0, 1)
        batches.append((draws.z_t, draws.t, draws.labels, draws.target))
    betas = [None if step < start else (20 - step) / (20 - start) for step in range(len(kept_at))]
    rate, clip = config.train.learning_rate, config.train.grad_clip
    return reference.train(student, model, batches, kept_at, betas, rate, clip), student


CASES = [
    pytest.param([(3, 1), (1, 2)], 2, PLAN, 2, id="zero3 and a pipeline"),
    pytest.param([(0, 1), (1, 1), (2, 1), (0, 2)], 2, PLAN, 2, id="the other stages", marks=FULL),
    pytest.param([(1, 4)], 4, [(3, [0, 1, 2, 3])], 0, id="four stages, one block each", marks=FULL),
    pytest.param([(1, 2)], 4, PLAN, 2, id="two stages on four ranks", marks=FULL),
]


@pytest.mark.parametrize(("cases", "world_size", "plan", "start"), CASES)
def test_training_with_a_teacher_is_that_of_one_process(teacher, cases, world_size, plan, start):
    given = {} if start else {"start": 0}
    ranks = run_ranks("tests.workers.distill:trained", world_size, teacher=teacher, cases=cases, plan=plan, **given)
    rows, student = expected(teacher, plan, start)
    for place, case in enumerate(cases):
        for found in (rank[place] for rank in ranks):
            for step, (row, wanted) in enumerate(zip(found["rows"], rows, strict=True)):
                seen = [row[0], None, None, None] if step < start else row
                assert row == seen, "no term is told of before the teacher sets in"
                for value, right in zip(row, wanted, strict=True):
                    assert value is None or value == pytest.approx(right, rel=2e-5, abs=1e-9), (case, step)
            steps = len(rows)
            assert found["beta"] == pytest.approx((20 - steps + 1) / (20 - start))
            trained = dict(student.named_parameters())
            for name, values in found["weights"].items():
                apart = (torch.tensor(values) - trained[name].detach().flatten()).abs()
                if name.endswith("qkv.bias"):  # keys' have no true gradient, and Adam makes much of rounding
                    apart = apart.view(3, -1)[[0, 2]]
                assert apart.max() < 3e-5, (case, name)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=FULL)])
def test_a_sharded_teacher_says_the_same_to_the_bit_and_is_never_whole(teacher, dtype):
    item = getattr(torch, dtype).itemsize
    for found in run_ranks("tests.workers.distill:placements", 2, teacher=teacher, dtype=dtype):
        block, stem, depth = found["block"], found["stem"], found["depth"]
        assert found["equal"] and found["keys"] == [0, 2]
        assert found["held"]["whole"] == item * (stem + depth * block)
        assert found["held"]["sharded"] == item * (stem + depth * block // 2 + block)
        assert found["made"]["sharded"][0][0] <= block  # the buffer of the gathered block
        assert sum(numel for numel, _ in found["made"]["sharded"]) < depth * block


def test_a_teacher_that_cannot_teach_is_refused_with_what_differs(teacher, tmp_path):
    from entprune_ds import comm
    from entprune_ds.teacher import open_teacher, teacher_problems

    config = replace(tiny_config(), distill=DistillConfig(kind="output", teacher=teacher, start=0))
    assert teacher_problems(config) == []

    def problem(**changes: object) -> str:
        [text] = teacher_problems(replace(config, **changes))  # type: ignore[arg-type]
        return text

    other = replace(MODEL, hidden_size=48, num_heads=3, patch_size=4, num_classes=5, process="dit", learn_sigma=True)
    text = problem(model=other)
    for key, ours, theirs in (("hidden_size", 48, 32), ("num_heads", 3, 2), ("patch_size", 4, 2), ("num_classes", 5, 3),
                              ("process", "dit", "sit"), ("learn_sigma", True, False)):  # fmt: skip
        assert f"`model.{key}` {ours} against {theirs}" in text
    assert "in_channels" not in text and "Take the model that the student is made from" in text
    assert "`model.depth` 6 against 4" in problem(model=replace(MODEL, depth=6))
    pruned = str(write_export(tmp_path / "pruned", random_source(MODEL.keeping((0, 3)))))
    assert "has no blocks [1, 2]" in problem(distill=replace(config.distill, teacher=pruned))
    smaller = replace(config, model=MODEL.keeping((0,)), distill=replace(config.distill, teacher=pruned, start=None))
    assert teacher_problems(smaller) == []  # it starts with fewer blocks than its teacher
    assert "`diffusion.path` is gvp" in problem(diffusion=replace(config.diffusion, path="gvp"))
    assert "there is no teacher" in problem(distill=DistillConfig(kind="output"))
    assert "nothing is removed" in problem(distill=replace(config.distill, start=None))
    softly = replace(config, distill=replace(config.distill, start=None), soft=SoftConfig(every=5, target_macs=0.5))
    assert teacher_problems(softly) == []
    assert "does not exist" in problem(distill=replace(config.distill, teacher=str(tmp_path / "nowhere")))
    raw = random_source(MODEL)
    raw = str(write_export(tmp_path / "raw", replace(raw, facts=raw.facts | {"weights": "raw"})))
    fresh, new = random_source(MODEL), {"label_table": "new for 3 classes"}
    fresh = str(write_export(tmp_path / "fresh", replace(fresh, facts=fresh.facts | new)))
    assert "has not learned these classes" in problem(distill=replace(config.distill, teacher=fresh))
    assert "Train it on the new classes first" in problem(model=replace(MODEL, num_classes=5))
    assert f"distill.teacher={raw}" in problem(model=replace(MODEL, weights=raw), distill=DistillConfig(kind="output"))
    broken = random_source(MODEL)
    broken.read("blocks.2.mlp.fc1.bias")[3] = math.nan
    broken = str(write_export(tmp_path / "broken", broken))
    with pytest.raises(comm.DistributedError, match=r"1 NaN or infinite values.*blocks\.2\.mlp\.fc1\.bias"):
        open_teacher(replace(config, distill=replace(config.distill, teacher=broken)), torch.float32)
    huge = random_source(MODEL)
    huge.read("final_layer.linear.weight").fill_(3e38)
    huge = str(write_export(tmp_path / "huge", huge))
    with pytest.raises(comm.DistributedError, match=r"huge\) gives NaN or infinite output in torch.float32, though"):
        open_teacher(replace(config, distill=replace(config.distill, teacher=huge)), torch.float32)
    from_ema = replace(config, model=replace(MODEL, weights=teacher), distill=DistillConfig(kind="output", start=0))
    assert teacher_problems(from_ema) == []


def test_impossible_settings_are_refused_before_anything_starts():
    from entprune_ds.config import problems_of

    def problems(**distill: object) -> list[str]:
        return problems_of(replace(Config(), distill=DistillConfig(**distill)))  # type: ignore[arg-type]

    assert problems() == [] and problems(kind="features", teacher="x") == []
    for setting, wrong, said in (
        ("kind", "both", "none, output, features"), ("placement", "rank0", "sharded, whole"),
        ("dtype", "float16", "train, float32, bfloat16"), ("plain_weight", -0.1, "at least 0"),
        ("output_weight", -1.0, "at least 0"), ("feature_weight", -1.0, "at least 0"),
        ("feature_sigma", 0.0, "above 0"), ("start", 1000, "lie in [0, train.num_steps)"), ("start", -1, "lie in"),
        ("teacher", "runs/base/model", "`distill.kind` is none"),
    ):  # fmt: skip
        [problem] = problems(**{setting: wrong})
        assert f"`distill.{setting}`" in problem and said in problem
    assert "must not both be 0" in problems(plain_weight=0.0, output_weight=0.0)[0]


def tiny_teacher(folder: Path, seed: int = 0) -> str:
    """A teacher of the model of test_training."""
    model = replace(MODEL, input_size=8, num_classes=10)
    return str(write_export(folder, random_source(model, seed)))


RESUMES = [
    pytest.param("zero3_fp32", 1),
    pytest.param("zero1_fp32", 2, marks=FULL),
    pytest.param("zero1_bf16", 1, marks=FULL),
]


@pytest.mark.parametrize(("ds_config", "stages"), RESUMES)
@pytest.mark.full
def test_a_distilled_run_resumes_exactly_and_another_teacher_is_refused(digits, tmp_path, ds_config, stages):
    path = tiny_teacher(tmp_path / "teacher")
    more = ["distill.kind=features", f"parallel.ds_config={ds_config}", f"parallel.pipe_stages={stages}",
            "prune.start_step=1", "prune.end_step=9"]  # fmt: skip

    def start(name: str, teacher: str) -> list[str]:
        return words(digits, tmp_path, name, *more, f"distill.teacher={teacher}")

    run_ranks("tests.workers.training:train", 2, runs=[start("whole", path)])
    whole = tmp_path / "whole"
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "train/loss" in row}
    removal = json.loads((whole / "decisions.jsonl").read_text().splitlines()[0])
    assert removal["step"] == 1 and removal["dropped"]
    assert [s for s, row in steps.items() if "train/loss_features" in row] == list(range(2, 13))
    beta = steps[2]["train/feature_weight"]
    assert beta == 2e-4 and steps[12]["train/feature_weight"] == pytest.approx(beta / 11)
    for row in (steps[2], steps[12]):
        terms = 0.1 * row["train/loss_plain"] + 0.9 * row["train/loss_output"]
        terms += row["train/feature_weight"] * row["train/loss_features"]
        assert row["train/loss"] == pytest.approx(terms, rel=1e-6) and row["train/loss_features"] > 0
    cut = cut_after(whole, tmp_path / "cut", 4)
    moved = str(write_export(tmp_path / "moved", random_source(replace(MODEL, input_size=8, num_classes=10))))
    another = tiny_teacher(tmp_path / "another", seed=5)
    with pytest.raises(AssertionError, match="Give the teacher that it was started with"):
        runs = [start("cut", moved), start("cut", another)]  # the same teacher in another place; then another one
        run_ranks("tests.workers.training:train", 2, runs=runs)
    assert losses(cut) == losses(whole) and what_was_logged(cut) == what_was_logged(whole)
    assert equal_state(cut / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")


@pytest.mark.full
def test_compiled_and_recomputed_blocks_learn_the_same(digits, tmp_path):
    path = tiny_teacher(tmp_path / "teacher")
    common = ["distill.kind=features", f"distill.teacher={path}", "distill.start=0", "train.num_steps=6",
              "prune.end_step=6", "distill.feature_weight=1"]  # fmt: skip
    options = {"plain": [], "other": ["model.compile=true", "model.activation_checkpointing=true"]}
    run_ranks(
        "tests.workers.training:train", 2, runs=[words(digits, tmp_path, n, *common, *o) for n, o in options.items()]
    )
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


class Peak(Made):
    """The most bytes alive at once of what is made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def note(self, tensor, where):
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))


def test_what_the_teacher_takes_is_estimated_and_shown(teacher, capsys):
    from entprune_ds.cli.dry_run import describe
    from entprune_ds.estimate_teacher import teacher_memory

    wide = replace(MODEL, hidden_size=64, input_size=8, depth=6)
    config = replace(tiny_config(), model=wide, distill=DistillConfig(kind="features", teacher=teacher))
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    made = Teacher(random_source(wide), torch.float32, sharded=True)  # one rank: nothing is gathered
    for kind, matched in (("features", matching(wide.blocks, wide.blocks)), ("output", {})):
        estimated = teacher_memory(replace(config, distill=replace(config.distill, kind=kind)), wide, 1)
        assert estimated.weights == made.nbytes
        with Peak() as peak:
            lessons = made.outputs(tiny_draws(config, 0, 0, 1).split(2), matched, True)
        assert 0.7 < peak.bytes / estimated.activations < 1.3, kind
        assert sum(x.nbytes for lesson in lessons for x in lesson.features.values()) < estimated.activations
    four, whole = teacher_memory(config, wide, 4), replace(config.distill, placement="whole", dtype="bfloat16")
    assert four.weights < made.nbytes
    assert teacher_memory(replace(config, distill=whole), wide, 4).weights == made.nbytes // 2
    keys = ("depth", "hidden_size", "num_heads", "input_size", "in_channels", "num_classes")
    more = ["distill.kind=output", f"distill.teacher={teacher}", "prune.target_depth=2", "prune.start_step=1"]
    describe([*(f"model.{key}={getattr(MODEL, key)}" for key in keys), *more])
    shown = capsys.readouterr().out
    assert f"# teacher (output, sharded), from the first removal on: depth 4: {teacher}" in shown
    assert "of weights and" in shown and "on a rank, beside the total" in shown
