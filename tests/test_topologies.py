"""docs/TOPOLOGIES.md, cell by cell: what it calls possible trains and prunes, the rest is refused at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entprune_ds.importance.criteria import CRITERIA
from tests.ranks import ROOT, run_ranks
from tests.test_distill import tiny_teacher
from tests.test_training import losses, words

RACE = ["race.budget=1", "race.validation_draws=16", "race.candidates=2"]
METHODS = {
    "training fp32": [],
    "training bf16": [],
    "offload of the optimizer": [],
    "activation checkpointing": ["model.activation_checkpointing=true"],
    "compiled blocks": ["model.compile=true"],
    "regrow_micro_batch": ["prune.regrow_micro_batch=true"],
    "park=device": ["resize.park=device"],
    "criterion explicit": ["prune.criterion=explicit", "prune.explicit_order=[1,2]"],
    "criterion learned": ["prune.criterion=learned", "learned.steps=3", "learned.batch_size=8"],
    "criterion combined": ["prune.criterion=combined", "prune.combined=[taylor:1,random:1]"],
    "criterion recovery_race": ["prune.criterion=recovery_race", *RACE],
    "greedy scores and branches": ["score.mode=greedy", "score.unit=attention"],
    "estimator low_rank": ["score.estimator=low_rank", "score.rank=4", "score.until=resolved", "score.max_draws=128"],
    "vote by NTK alone": ["prune.vote_weights=[1,0,0]"],
    "vote by ZiCo alone": ["prune.vote_weights=[0,1,0]"],
    "vote with step time": ["prune.vote_weights=[1,0.5,0.5]"],
    "distillation from a teacher": ["distill.kind=features", "distill.feature_weight=1"],
    "gradient-flow soft pruning": ["soft.every=1", "soft.start_step=1", "soft.end_step=5", "soft.removals=2"],
}
REFUSALS = {
    "pipe, zero2": "Set parallel.zero_stage=1, or parallel.pipe_stages=1",
    "pipe, zero3": "Set parallel.zero_stage=1, or parallel.pipe_stages=1",
    "compiled blocks": "Set model.compile=false, or choose stage 0, 1 or 2",
    "offload of the optimizer": "or remove offload_optimizer",
    "regrow_micro_batch": "Switch it off, or train without a pipeline",
}
RUN = ["prune.start_step=1", "train.num_steps=7", "prune.end_step=6", "train.validate_every=0", "sample.grid=1"]


def table() -> dict[str, dict[str, bool]]:
    """{topology: {method: whether it works}} as the document says."""
    lines = [line for line in (ROOT / "docs" / "TOPOLOGIES.md").read_text().splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(cell in ("yes", "no") for row in rows for cell in row[1:])
    return {name: {row[0]: row[i] == "yes" for row in rows} for i, name in enumerate(head) if i}


def settings(topology: str, method: str, folder: Path) -> list[str]:
    """The words of a cell."""
    zero, precision = topology.split("zero")[1], "bf16" if "bf16" in method else "fp32"
    path = folder / f"offload_{zero}.json"
    offload = {"stage": int(zero), "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": offload}))
    ds_config = path if method.startswith("offload") else f"zero{zero}_{precision}"
    teacher = []
    if method.startswith("distillation"):
        teacher = [f"distill.teacher={tiny_teacher(folder / 'teacher')}"]
    pipeline = ["parallel.pipe_stages=2"] if topology.startswith("pipe") else []
    return [
        f"parallel.ds_config={ds_config}",
        *pipeline,
        *teacher,
        *METHODS.get(method, [f"prune.criterion={method.split()[-1]}"]),
    ]


def cells(works: bool) -> list[tuple[str, str]]:
    return [(t, m) for t, methods in table().items() for m, yes in methods.items() if yes is works]


def test_the_table_has_every_criterion_and_every_topology():
    assert {m.split()[-1] for m in table()["zero0"] if m.startswith("criterion")} == set(CRITERIA)
    assert set(METHODS) <= set(table()["zero0"])
    assert list(table()) == [f"{pipe}zero{stage}" for pipe in ("", "pipe, ") for stage in range(4)]


@pytest.mark.parametrize(("topology", "method"), cells(works=False))
def test_what_the_table_excludes_is_refused_with_its_remedy(digits, tmp_path, monkeypatch, capsys, topology, method):
    from entprune_ds.cli.train import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words(digits, tmp_path, "refused", *settings(topology, method, tmp_path), *RUN)) == 2
    error = capsys.readouterr().err
    assert any(REFUSALS[cause] in error for cause in (topology, method) if cause in REFUSALS)
    assert not (tmp_path / "refused").exists()


@pytest.mark.full
@pytest.mark.parametrize("topology", [t for t, methods in table().items() if any(methods.values())])
def test_what_the_table_promises_trains_and_prunes(digits, tmp_path, topology):
    methods = [m for m, yes in table()[topology].items() if yes]
    names = {m: f"run_{i}" for i, m in enumerate(methods)}
    runs = [words(digits, tmp_path, names[m], *settings(topology, m, tmp_path), *RUN) for m in methods]
    reference = words(digits, tmp_path, "reference", "parallel.ds_config=zero1_fp32", *RUN)
    taught = words(digits, tmp_path, "taught", *settings("zero1", "distillation from a teacher", tmp_path), *RUN)
    ranks = run_ranks("tests.workers.training:train", 2, timeout=580, runs=[*runs, reference, taught])
    assert ranks == [[0] * (len(runs) + 2)] * 2
    for method, name in names.items():
        run = tmp_path / name
        decisions = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
        assert len(decisions[-1]["kept_blocks"]) == 2, method
        found = losses(run)
        expected = losses(tmp_path / ("taught" if method.startswith("distillation") else "reference"))
        assert found.keys() == expected.keys()
        near = 0.05 if "bf16" in method else 1e-5
        same = range(
            1, 2 if method.startswith(("criterion", "estimator", "vote", "greedy", "gradient-flow")) else 8
        )  # another order trains another model
        assert [found[s] for s in same] == pytest.approx([expected[s] for s in same], rel=near), method
        if method == "criterion explicit":
            assert decisions[-1]["kept_blocks"] == [0, 3]
