"""Criteria chosen by the settings: names, combinations, and a user's own file, whose code must be asked for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from entprune_ds import comm
from entprune_ds.cli.common import with_run
from entprune_ds.config import Config, ConfigError, PruneConfig, load_config, problems_of, to_yaml
from entprune_ds.coordinator import measure
from entprune_ds.criterion_choice import chosen_criterion
from entprune_ds.importance.criteria import CRITERIA, Criterion, removal_order
from entprune_ds.preflight import training_problems
from entprune_ds.pruning.policy import state_of
from entprune_ds.ranking import rank_blocks
from tests.ranks import ROOT
from tests.reference.checks import toy_check
from tests.reference.toys import draws, random_dit

PAGE = (ROOT / "docs" / "CRITERIA.md").read_text()


@pytest.fixture
def example(tmp_path) -> str:
    """The file of docs/CRITERIA.md."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(code.splitlines()) <= 25
    path = tmp_path / "my_criterion.py"
    path.write_text(code)
    return str(path)


def test_the_page_has_a_line_for_every_criterion():
    rows = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    assert sorted(rows) == sorted(["criterion", *CRITERIA])


def test_the_example_of_the_page_orders_blocks_by_what_they_change(example):
    model = random_dit(depth=4)

    def draw(number, count, t):
        return draws(model, count, step=number)

    for block, size in zip("0123", (0.3, 1.0, 0.01, 0.1), strict=True):  # how much each block adds
        for module in (model.blocks[block].attn.proj, model.blocks[block].mlp.fc2):
            module.weight.data *= size
            module.bias.data *= size
    m = toy_check(model, draw, prune=PruneConfig(target_depth=2, criterion=example))
    scores = measure(m)
    assert set(scores["change"]) == {0, 1, 2, 3} and "loss" in scores  # the sweep is measured for the record
    assert removal_order(chosen_criterion(m.config.prune), scores, range(4), target_depth=2) == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("CRITERION = 7", "must define CRITERION = Criterion"),
        ("", "must define CRITERION = Criterion"),
        ("import entprune_ds.nothing", "cannot be run (ModuleNotFoundError: No module named"),
        ("CRITERION = (", "cannot be run (SyntaxError"),
    ],
)
def test_a_file_that_defines_no_criterion_is_refused_before_the_start(tmp_path, code, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    words = [f"prune.criterion={path}", "prune.target_depth=2", "model.depth=4", "model.hidden_size=32"]
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config([*words, "model.num_heads=2"], check=lambda c: training_problems(c, data_needed=False))


def test_a_file_is_run_for_a_pruning_run_only(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_config([f"prune.criterion={path}"], check=lambda c: training_problems(c, data_needed=False))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`prune.criterion` is .*gone.py, which is not a file"):
        load_config([f"prune.criterion={tmp_path}/gone.py"])


def test_a_preset_cannot_name_a_file(tmp_path, example):
    preset = tmp_path / "p.yaml"
    preset.write_text(f"prune: {{criterion: {example}}}")
    with pytest.raises(ConfigError, match=r"whose code would run\. Take it out"):
        load_config([f"preset={preset}", "prune.num_checks=2"])
    assert load_config([f"preset={preset}", "prune.criterion=loss"]).prune.criterion == "loss"
    assert load_config([f"prune.criterion={example}"]).prune.criterion == example


def test_the_folder_of_a_run_with_a_user_criterion_can_be_sampled_from(tmp_path, example):
    config = replace(Config(), prune=PruneConfig(target_depth=2, criterion=example, num_checks=2))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    words, _ = with_run([f"run={tmp_path}"], "sample")
    found = load_config(words, check=lambda c: []).prune
    assert (found.criterion, found.num_checks) == (PruneConfig().criterion, 2)


def test_an_order_that_is_none_removes_nothing():
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 2, 5]):
        with pytest.raises(
            ValueError, match=r"must order the present blocks \[0, 1, 2\], each once.*Nothing was removed"
        ):
            removal_order(Criterion(lambda request, wrong=wrong: wrong), {}, range(3), target_depth=1)


def check_with(tmp_path, code: str):
    """A check of three blocks by a file with this code."""
    path = tmp_path / "mine.py"
    head = "from entprune_ds.importance.criteria import Criterion, lowest_score_first\n"
    path.write_text(head + "from entprune_ds.importance.scores import Score\n" + code)
    prune = PruneConfig(target_depth=2, criterion=str(path), num_checks=1)
    return toy_check(
        random_dit(depth=3), lambda number, count, t: draws(random_dit(depth=3), count, number), prune=prune
    )


MEASURES = [
    (
        "None",
        "its measure must return {name: {block: Score(value, standard_error)}} for blocks [0, 1, 2], but returned",
    ),
    ("{'x': {b: 0.5 for b in m.kept_blocks}}", "but x holds float"),
    ("{'x': {0: Score(1.0, 0.0)}}", "but x is of blocks [0]"),
    ("{'x': {b: Score(1.0, 0.0) for b in (0, 1, 9)}}", "but x is of blocks [0, 1, 9]"),
    ("{7: {b: Score(1.0, 0.0) for b in m.kept_blocks}}", "but returned {7: dict}"),
    ("{'x': {b: Score(1 / 0, 0.0) for b in m.kept_blocks}}", "line 4: its measure fails (ZeroDivisionError: division"),
    ("{'x': {b: Score('much', 0.0) for b in m.kept_blocks}}", "holds a score that is no number"),
]


@pytest.mark.parametrize(("returned", "message"), MEASURES)
def test_what_a_measure_of_a_user_returns_is_checked_and_the_file_is_named(tmp_path, returned, message):
    code = f"def measure(m):\n    return {returned}\n\nCRITERION = Criterion(lowest_score_first('x'), measure)\n"
    m = check_with(tmp_path, code)
    with pytest.raises(comm.RankError, match=re.escape(message)) as caught:
        measure(m)
    assert str(caught.value).startswith(f"check 0: `prune.criterion` {tmp_path}/mine.py")
    assert "Nothing was removed" in str(caught.value)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("request.kept_blocks[5]", "mine.py, line 3: its order fails (IndexError: tuple index out of range)"),
        ("None", "its order fails (TypeError: 'NoneType' object is not iterable)"),
        (
            "[float(b) for b in request.kept_blocks]",
            "must order the present blocks [0, 1, 2], each once, but gave [0.0",
        ),
        (
            "lowest_score_first('x')(request)",
            "mine.py, line 3: check 0: blocks [0, 1, 2] have no finite `x` score. Nothing was",
        ),
    ],
)
def test_an_order_of_a_user_that_is_none_ends_all_ranks_with_one_line(tmp_path, order, message):
    scores = "{'x': {b: Score(float('nan'), 0.0) for b in m.kept_blocks}}"
    m = check_with(tmp_path, f"CRITERION = Criterion(lambda request: {order}, lambda m: {scores})\n")
    m = replace(m, config=replace(m.config, score=replace(m.config.score, sweep="needed")))
    with pytest.raises(comm.DistributedError, match=re.escape(message)):
        rank_blocks(m, state_of(m.config, 0, 0, m.kept_blocks, 3))


def test_numbers_of_numpy_and_torch_in_scores_and_orders_are_taken(tmp_path):
    code = "import numpy, torch\n"
    code += "CRITERION = Criterion(lambda request: list(numpy.array([1, 0])) + [torch.tensor(2)],\n"
    code += "    lambda m: {'x': {b: Score(torch.tensor(1.5), numpy.float64(0)) for b in m.kept_blocks}})\n"
    m = check_with(tmp_path, code)
    m = replace(m, config=replace(m.config, score=replace(m.config.score, sweep="needed")))
    ranking = rank_blocks(m, state_of(m.config, 0, 0, m.kept_blocks, 3))
    assert ranking.order == [1, 0, 2] and {type(b) for b in ranking.order} == {int}
    assert {type(s.value) for s in ranking.scores["x"].values()} == {float}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(criterion="combined"), "needs `prune.combined`"),
        (dict(combined=("speed:1",)), "`prune.combined` may hold ced,"),
        (dict(combined=("combined:1",)), "got combined."),
        (dict(combined=("recovery_race:1",)), "got recovery_race."),
        (dict(combined=("ced",)), "as NAME:WEIGHT, each weight above 0"),
        (dict(combined=("ced:0",)), "got ced:0"),
        (dict(combined=("ced:-1",)), "got ced:-1"),
        (dict(combined=("ced:1", "ced:2")), "got ced:2"),
        (dict(criterion="speed"), "`prune.criterion` must be one of ced,"),
    ],
)
def test_impossible_combinations_are_refused(settings, message):
    found = problems_of(replace(Config(), prune=PruneConfig(**settings)))
    assert len(found) == 1 and message in found[0]


def test_a_combination_is_written_on_the_command_line():
    config = load_config(["prune.criterion=combined", "prune.combined=[ced:1,loss:0.5]"])
    assert config.prune.combined_weights == {"ced": 1.0, "loss": 0.5}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learned.steps=0", "`learned.steps` must be at least 1"),
        ("learned.batch_size=0", "`learned.batch_size` must be at least 1"),
        ("learned.lora_rank=-1", "`learned.lora_rank` must be at least 0"),
        ("learned.group_size=1", "`learned.group_size` must lie in [2, 16]"),
        ("learned.group_size=17", "`learned.group_size` must lie in [2, 16]"),
        ("learned.learning_rate=0", "`learned.learning_rate` must be above 0"),
        ("learned.tau=[0.1,4]", "`learned.tau` must be two numbers"),
        ("score.gradient_batches=1", "`score.gradient_batches` must be at least 2"),
        ("score.gradient_batch_size=0", "`score.gradient_batch_size` must be at least 1"),
        ("score.taylor_t=[1.0]", "`score.taylor_t` must lie in [0, 1)"),
        ("score.taylor_t=[0.1,0.2,0.3]", "must be a multiple of the 3 times"),
        ("score.diff_pruning_threshold=1", "`score.diff_pruning_threshold` must lie in [0, 1)"),
    ],
)
def test_impossible_settings_of_the_criteria_are_refused(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config([word])


def test_learned_gates_need_a_draw_for_every_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ["prune.criterion=learned", "prune.target_depth=2", "learned.batch_size=3"]
    with pytest.raises(ConfigError, match=r"`learned.batch_size` must be at least the number of ranks \(4\)"):
        load_config(words, check=lambda c: training_problems(c, data_needed=False))
