"""Any words and any files: every command refuses what it cannot use on one line per problem, and raises nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_cases import QUICK, inside, make_places, refused, words

BAD = {
    "train": ["data.shards="], "score": ["model.weights="], "sample": ["model.weights="],
    "evaluate": ["model.weights="],
    "import": ["src="], "export": ["src=", "out="], "shards": ["data.shard_size=0"], "encode": ["sample.vae="],
    "compare": ["data.shards="], "report": [],
}  # fmt: skip
"""Words that each command refuses whatever stands before them, so that nothing is started."""
FILES = {
    "train": [
        "preset={}",
        "data.shards={} model.weights=missing",
        "model.weights={}",
        "run.root={} run.name=x",
        "run.name={}",
        "data.shards={} data.val_shards={} model.weights=missing",
        "parallel.ds_config={}",
        "prune.target_depth=3 prune.criterion={}.py",
        "distill.kind=output distill.teacher={}",
        "--dry-run data.shards={}",
        "--dry-run model.weights={}",
        "run.root=. run.name={}",
    ],
    "score": ["run={}", "weights={}", "--replay {}", "preset={} weights={}", "score.out={}"],
    "sample": ["run={}", "weights={}", "weights={} out=file_text.json/x", "preset={}", "out={} weights=missing"],
    "evaluate": [
        "run={}",
        "weights={}",
        "weights={} evaluate.baseline={}",
        "weights=missing evaluate.samples={}",
        "data.shards={} weights=missing",
    ],
    "import": [
        "src={} out=file_text.json/x",
        "src={} out=file_text.json/x model.process=dit",
        "src={} out={} weights=raw",
    ],
    "export": [
        "run={} out=file_text.json/x",
        "src={} out=file_text.json/x",
        "src={} out=file_text.json/x.pt format=official",
        "src={} out=file_text.json/x format=diffusers vae={}",
        "run={} weights=raw out=file_text.json/x",
    ],
    "shards": [
        "source=folder src={} out=file_text.json/x",
        "source=csv src={} out=file_text.json/x",
        "source=webdataset src={} out=file_text.json/x",
        "source=folder src={} out=o --dry-run",
        "source=csv src={} out=o --dry-run",
        "source=webdataset src={} out=o --dry-run",
        "preset={} out=file_text.json/x",
        "out={} data.shard_size=0",
    ],
    "encode": [
        "data.shards={} out=o sample.vae=missing",
        "data.shards={} out=o sample.vae={}",
        "data.shards={} out={} sample.vae=x --dry-run",
    ],
    "compare": [
        "preset=digits prune.target_depth=2 base={}",
        "preset=digits data.shards={} target_depth=2",
        "preset={}",
        "criteria=[{}.py]",
    ],
    "report": ["{}", "{} {}"],
}
"""Words that take a path; {} is where it goes."""
MAY_PASS = {"report": (0, 2), "score": (0, 1, 2)}
"""Commands that may find nothing wrong with these: the report of a damaged run folder says what is damaged."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of unusable files and folders, and their names."""
    root = tmp_path_factory.mktemp("places")
    return root, make_places(root)


def statuses(command: str, template: str) -> tuple[int, ...]:
    if "--dry-run" in template:
        return (0, 2)
    return MAY_PASS.get(command, (2,)) if command != "score" or "--replay" in template else (2,)


@pytest.mark.parametrize("command", BAD)
@settings(**QUICK, max_examples=60)
@given(data=st.data())
def test_random_words_are_refused_on_one_line_each(command, data, places):
    given_words = data.draw(st.lists(words, max_size=4))
    with inside(places[0]):
        refused(command, [*given_words, *BAD[command]])


@pytest.mark.parametrize("command", FILES)
def test_bad_files_are_refused_on_one_line_each(command, places):
    root, names = places
    with inside(root):
        for number, name in enumerate(names):
            template = FILES[command][number % len(FILES[command])]
            refused(command, [w.replace("{}", name) for w in template.split()], statuses(command, template))


@pytest.mark.full
@pytest.mark.parametrize("command", FILES)
def test_all_bad_files_in_all_places(command, places):
    root, names = places
    with inside(root):
        for template in FILES[command]:
            for name in names:
                refused(command, [w.replace("{}", name) for w in template.split()], statuses(command, template))
