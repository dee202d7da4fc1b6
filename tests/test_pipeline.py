"""Pipelines whose stages change while they train: equality to the bit, the unsharded reference, nothing left behind."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.checkpoint import manifest_sha256
from entprune_ds.engine.transfer import transfers
from entprune_ds.models.dit import DiT, initialize
from tests.ranks import run_ranks
from tests.test_resize import agree_with_reference
from tests.test_training import cut_after, equal_state, losses, words
from tests.tiny import tiny_draws
from tests.workers.pipeline import GRAD_CLIP, load_state, pipe_config
from tests.workers.resize import reference as plain_reference

FULL = pytest.mark.full
MUTATIONS = ["swapped_moments", "forgotten_step", "shifted_block", "stale_ema"]
SCENARIOS = {  # cuts, removals
    "interior": ([[2, 2], [1, 2]], [[0, 2, 3]]),  # a block of the first stage goes, none moves
    "first": ([[2, 2], [1, 2]], [[1, 2, 3]]),
    "last": ([[2, 2], [2, 1]], [[0, 1, 2]]),
    "several": ([[3, 1], [1, 1]], [[0, 3]]),  # two at once, all of one stage
    "twice": ([[1, 3], [2, 1], [0, 2]], [[1, 2, 3], [1, 2]]),  # first and last block; a block moves back and forth
}
MATRIX = [
    pytest.param(1, 2, "fp32", "twice"),
    *(pytest.param(zero, 2, dtype, "several", marks=FULL) for zero, dtype in ((0, "fp32"), (1, "fp32"), (1, "bf16"))),
    *(pytest.param(zero, 4, dtype, "interior", marks=FULL) for zero, dtype in ((0, "fp32"), (1, "fp32"), (1, "bf16"))),
    pytest.param(0, 4, "fp32", "twice", marks=FULL),
    *(pytest.param(0, world, "bf16", name, marks=FULL) for world in (2, 4) for name in ("first", "last")),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Losses and final weights of one unsharded process without DeepSpeed, clipped like the pipelines."""
    folder, removals = tmp_path_factory.mktemp("reference"), {name: kept for name, (_, kept) in SCENARIOS.items()}
    return plain_reference(str(folder), removals, GRAD_CLIP), folder


@pytest.mark.parametrize(("zero_stage", "world_size", "dtype", "scenario"), MATRIX)
def test_a_resized_pipeline_continues_like_a_fresh_one(tmp_path, reference, zero_stage, world_size, dtype, scenario):
    cuts, removals = SCENARIOS[scenario]
    common = {"folder": str(tmp_path), "zero_stage": zero_stage, "dtype": dtype}
    live = run_ranks("tests.workers.pipeline:live", world_size, cuts=cuts, removals=removals, **common)
    arguments = {"kept_blocks": removals[-1], "cut": cuts[-1], "steps": len(live[0]["before"])}
    fresh = run_ranks("tests.workers.pipeline:fresh", world_size, mutations=["none", *MUTATIONS], **common, **arguments)
    expected, state = load_state(tmp_path, "live"), load_state(tmp_path, "fresh_none")
    for rank in range(world_size):
        assert live[rank]["ema_kept"] and live[rank]["settings_kept"]
        assert fresh[rank]["none"] == live[rank]["after"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for mutation in MUTATIONS:
        wrong = load_state(tmp_path, f"fresh_{mutation}")
        assert (fresh[0][mutation] != live[0]["after"]) == (mutation != "stale_ema"), mutation
        assert any(not torch.equal(wrong[name], expected[name]) for name in expected), mutation
    sizes = {name: t.numel() for name, t in expected.items() if name.startswith("weight/")}
    assert max(r["held"] for r in live) < 0.85 * sum(sizes.values())  # no rank holds the whole model
    block = sum(n for name, n in sizes.items() if name.startswith(f"weight/blocks.{removals[-1][0]}."))
    replicas = world_size // 2
    for [sent, minimum], moved in zip(live[0]["traffic"], blocks_moved(cuts, removals), strict=True):
        assert sent == minimum
        if (zero_stage, dtype) == (0, "fp32") or replicas == 1:  # else partitions shift within a stage
            assert sent == 16 * block * moved * replicas  # weight, two moments and EMA in fp32
    if dtype == "fp32":
        agree_with_reference(reference, scenario, live, expected)


def blocks_moved(cuts: list[list[int]], removals: list[list[int]]) -> list[int]:
    """How many of the blocks that stay change their stage, for every resize."""
    stages = [
        dict(zip(kept, [stage for stage, count in enumerate(cut) for _ in range(count)], strict=True))
        for kept, cut in zip([range(4), *removals], cuts, strict=True)
    ]
    return [sum(old[b] != stage for b, stage in new.items()) for old, new in pairwise(stages)]


def ranges(blocks: tuple[int, ...], cut: tuple[int, ...]) -> list[list[tuple[str, int, int]]]:
    """Who holds what on a pipeline, in tensors of ten elements."""
    layers = ["stem", *[f"blocks.{b}" for b in blocks], "head"]
    bounds = [0, *(1 + sum(cut[: i + 1]) for i in range(len(cut) - 1)), len(layers)]
    return [[(name, 0, 10) for name in layers[a:b]] for a, b in pairwise(bounds)]


def test_only_layers_that_change_their_stage_travel():
    old = ranges((0, 1, 2, 3), (2, 2))

    def travelling(new: list) -> list:
        return [(source, target, *rest) for source, target, *rest in transfers(old, new) if source != target]

    assert travelling(ranges((0, 2, 3), (1, 2))) == []
    assert travelling(ranges((0, 2, 3), (2, 1))) == [(1, 0, "blocks.2", 0, 10)]
    assert travelling(ranges((1, 2, 3), (0, 3))) == [(0, 1, "blocks.1", 0, 10)]


def unsharded(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch in one process: whole batch, clipping, AdamW."""
    config = pipe_config(0, "fp32", 1)
    model, train = initialize(DiT(config.model), config.run.seed), config.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    losses = []
    for step in range(steps):
        draws = tiny_draws(config, step, 0, 1)
        loss = FlowObjective().loss(model(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        assert norm > 2 * train.grad_clip  # clipping is active, or the test shows nothing
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("zero_stage", "world_size"), [(0, 2), *(pytest.param(z, w, marks=FULL) for z, w in ((1, 2), (0, 4), (1, 4)))]
)
def test_a_pipeline_trains_like_the_unsharded_model_and_rebuilds_leave_nothing(tmp_path, zero_stage, world_size):
    arguments = {"folder": str(tmp_path), "zero_stage": zero_stage, "stages": 2, "steps": 8}
    ranks = run_ranks("tests.workers.pipeline:trained", world_size, **arguments)
    expected, weights = unsharded(8)
    replicas = [[float.fromhex(x) for x in r["losses"]] for r in ranks[: world_size // 2]]
    assert [r["losses"] for r in ranks[world_size // 2 :]] == [r["losses"] for r in ranks[: world_size // 2]]
    assert [sum(step) / len(step) for step in zip(*replicas, strict=True)] == pytest.approx(expected, rel=1e-6)
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        rows = len(wanted) // 3
        if name.endswith("qkv.bias"):  # key biases have no true gradient: Adam amplifies rounding
            wanted, found[name] = (torch.cat([t[:rows], t[2 * rows :]]) for t in (wanted, found[name]))
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    for rank in ranks:
        left, counts = rank["left"], rank["counts"]
        assert [left[kind] for kind in ("groups", "engines", "models", "grids")] == [rank["groups"], 0, 0, 0]
        memory = [cycle.pop("rss") for cycle in counts]
        assert counts == counts[:2] * 5  # two cuts take turns
        assert all([cycle[kind] for kind in ("engines", "models", "grids")] == [1, 1, 1] for cycle in counts)
        assert memory[9] <= memory[2] * 1.01**7, memory
        assert all(sent == minimum > 0 for sent, minimum in rank["traffic"])


def test_a_pipeline_prunes_and_resumes_exactly(digits, tmp_path):
    pipeline, whole = "parallel.pipe_stages=2", tmp_path / "whole"
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "whole", pipeline)])
    decisions = [json.loads(line) for line in (whole / "decisions.jsonl").read_text().splitlines()]
    assert [len(d["kept_blocks"]) for d in decisions][-1] == 2
    assert all(sum(d["cut"]) == len(d["kept_blocks"]) and len(d["cut"]) == 2 for d in decisions)
    cut = cut_after(whole, tmp_path / "cut", 4)  # before step 4 stands the second check: it is repeated
    plain = cut_after(whole, tmp_path / "plain", 8)
    runs = [words(digits, tmp_path, "cut", pipeline), words(digits, tmp_path, "plain")]
    run_ranks("tests.workers.training:train", 2, runs=runs)
    last = "checkpoints/step_00000012"
    assert losses(cut) == losses(whole)
    assert equal_state(cut / last, whole / last)
    assert (cut / "decisions.jsonl").read_text() == (whole / "decisions.jsonl").read_text()
    assert losses(plain) == pytest.approx(losses(whole), rel=1e-5)  # from step 8 without a pipeline


ZERO1_ON_2, ZERO3_ON_1, ZERO2_ON_4, PIPELINE_ON_2, PIPELINE_ON_4 = (1, 2, 1), (3, 1, 1), (2, 4, 1), (1, 2, 2), (0, 4, 2)
HOPS = {
    "from ZeRO-1": ([], [ZERO3_ON_1, ZERO2_ON_4, PIPELINE_ON_2, ZERO2_ON_4, ZERO3_ON_1, ZERO1_ON_2]),
    "from a pipeline": (["parallel.pipe_stages=2"], [ZERO1_ON_2, ZERO3_ON_1, PIPELINE_ON_4, PIPELINE_ON_2]),
}


@FULL
@pytest.mark.parametrize(("first", "hops"), HOPS.values(), ids=HOPS)
def test_checkpoints_keep_the_state_from_topology_to_topology(digits, tmp_path, first, hops):
    whole = tmp_path / "whole"
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "whole", *first)])
    source = whole / "checkpoints/step_00000008"  # after the removals
    manifest = json.loads((source / "manifest.json").read_text())
    total = sum(torch.Size(shape).numel() for shape in manifest["shapes"].values())
    recorded = {"cut": [2, 0]}  # no measurement would choose it: it is followed because it is recorded
    manifest["record"] |= recorded
    manifest["sha256"] = manifest_sha256(manifest)
    (source / "manifest.json").write_text(json.dumps(manifest))
    assert manifest["adam_step"] == 8 and manifest["ema_count"] > 0 and len(manifest["record"]["decisions"]) == 2
    for number, (zero_stage, world_size, stages) in enumerate(hops):
        out = tmp_path / f"carried_{number}"
        arguments = {"source": str(source), "out": str(out), "zero_stage": zero_stage, "stages": stages}
        cuts = run_ranks("tests.workers.pipeline:carry", world_size, **arguments)
        source = out / "step_00000008"
        assert equal_state(source, whole / "checkpoints/step_00000008"), (zero_stage, world_size, stages)
        carried = json.loads((source / "manifest.json").read_text())
        assert beside_files(carried) == beside_files(manifest), (zero_stage, world_size, stages)
        spans = [span for file in carried["files"] for span in file["ranges"]]
        assert sum(stop - start for _, start, stop in spans) == total  # nothing twice
        assert cuts == [recorded["cut"] if stages == 2 else None] * world_size


def beside_files(manifest: dict) -> dict:
    """What a checkpoint says on any topology: architecture, steps behind the moments and the EMA, the record."""
    return {key: value for key, value in manifest.items() if key not in ("files", "sha256")}


@FULL
def test_a_pipeline_with_fewer_blocks_than_stages_shrinks_to_replicas(digits, tmp_path):
    more = ["parallel.pipe_stages=4", "train.num_steps=9"]
    run_ranks("tests.workers.training:train", 4, runs=[words(digits, tmp_path, "pipe", *more)])
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "plain", "train.num_steps=9")])
    decisions = [json.loads(line) for line in (tmp_path / "pipe" / "decisions.jsonl").read_text().splitlines()]
    assert len(decisions[-1]["cut"]) == 2 and len(decisions[-1]["kept_blocks"]) == 2
    assert losses(tmp_path / "pipe") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    last = "checkpoints/step_00000009/manifest.json"
    records = [json.loads((tmp_path / name / last).read_text())["record"] for name in ("pipe", "plain")]
    assert records[0]["stream"] == records[1]["stream"]


REFUSALS = {
    "must be at most the 4 blocks": (["parallel.pipe_stages=8"], 8),
    "must divide the number of ranks (3)": (["parallel.pipe_stages=2"], 3),
    "needs ZeRO stage 0 or 1, but": (["parallel.pipe_stages=2", "parallel.zero_stage=3"], 2),
    "`parallel.pipe_stages` must be above 0": (["parallel.pipe_stages=0"], 1),
    "is more than 2 blocks, and no smaller pipeline": (  # 3 ranks share neither the readers nor the batch
        ["parallel.pipe_stages=3", "prune.target_depth=2"], 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_impossible_pipelines_are_refused_before_any_process_group(digits, tmp_path, monkeypatch, capsys, message):
    from entprune_ds.cli.train import main

    more, world_size = REFUSALS[message]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main(words(digits, tmp_path, "refused", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("parallel.pipe_stages") >= 1
    assert not torch.distributed.is_initialized() and not (tmp_path / "refused").exists()


def test_a_deepspeed_without_what_pipelines_rely_on_is_refused(monkeypatch):
    from entprune_ds.engine import pipeline

    pipeline.check_deepspeed_pipeline()
    monkeypatch.setitem(pipeline.NEEDED, pipeline.PipelineModule, ("_build", "_gone_in_a_later_version"))
    with pytest.raises(RuntimeError, match=r"no PipelineModule._gone_in_a_later_version. Install deepspeed==0.19.8"):
        pipeline.check_deepspeed_pipeline()
