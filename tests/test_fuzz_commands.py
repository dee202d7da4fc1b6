"""Any words and any files: every command refuses what it cannot use on one line per problem, and raises nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_cases import QUICK, inside, keys, make_places, refused, values, words

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
EVERY = 5
"""Of the bad files, each command sees every fifth in the quick tests, beginning at another one."""
MAY_PASS = {"report": (0, 2), "score": (0, 1, 2)}
"""Commands that may find nothing wrong with these: the report of a damaged run folder says what is damaged."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of unusable files and folders, and their names."""
    root = tmp_path_factory.mktemp("places")
    return root, make_places(root)


def coded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def statuses(command: str, template: str) -> tuple[int, ...]:
    if "--dry-run" in template:
        return (0, 2)
    return MAY_PASS.get(command, (2,)) if command != "score" or "--replay" in template else (2,)


def check_words(command: str, given_words: list[str], root: Path) -> None:
    with inside(root):
        refused(command, [*given_words, *BAD[command]])


@pytest.mark.parametrize("command", BAD)
@settings(**QUICK, max_examples=40)
@given(given_words=st.lists(words, max_size=4))
def test_random_words_are_refused_on_one_line_each(command, given_words, places):
    check_words(command, given_words, places[0])


@pytest.mark.full
@pytest.mark.parametrize("command", BAD)
@settings(**QUICK, max_examples=2000)
@given(given_words=st.lists(words, max_size=6))
def test_many_random_words_are_refused_on_one_line_each(command, given_words, places):
    check_words(command, given_words, places[0])


def check_files(command: str, names: list[str], templates: list[str], root: Path) -> None:
    with inside(root):
        for template in templates:
            for name in names:
                refused(command, [w.replace("{}", name) for w in template.split()], statuses(command, template))


@pytest.mark.parametrize("command", FILES)
def test_bad_files_are_refused_on_one_line_each(command, places):
    """Every command sees each kind of file once, in one of its places; the others are in the full matrix."""
    root, names = places
    templates, start = FILES[command], list(FILES).index(command)
    for number, name in enumerate(names[start % EVERY :: EVERY]):
        check_files(command, [name], [templates[number % len(templates)]], root)


def test_presets_that_are_no_presets(places):
    root, names = places
    presets = [name for name in names if name.endswith(".yaml")]
    assert {"file_binary.yaml", "file_itself.yaml", "folder.yaml", "loop.yaml", "file_bomb.yaml"} <= set(presets)
    with inside(root):
        for name in presets:
            refused("train", [f"preset={name}"])


@settings(**QUICK, max_examples=60)
@given(
    content=st.one_of(st.binary(max_size=30), st.builds("{}: {}".format, keys, values).map(coded), values.map(coded))
)
def test_a_preset_of_any_bytes(content, places):
    with inside(places[0]):
        Path("any.yaml").write_bytes(content)
        refused("train", ["preset=any.yaml", "data.shards="])


@pytest.mark.full
@pytest.mark.parametrize("command", FILES)
def test_all_bad_files_in_all_places(command, places):
    check_files(command, places[1], FILES[command], places[0])


@pytest.mark.parametrize(
    ("command", "given_words", "told"),
    [
        ("train", ["preset=file_bomb.yaml"], "`*a0` refers to another part: write it out"),
        ("train", ["preset=file_tag.yaml"], "is not plain YAML"),
        ("train", ["preset=file_deep.yaml"], "is not plain YAML"),
        ("train", ["model.depth=!!timestamp x"], "`model.depth` must be a whole number, got '!!timestamp x'"),
        ("train", ["model.depth=" + "9" * 25], "`model.depth` is too large a number, got 9999"),
        ("train", ["model.in_channels=4611686018427387904", "--dry-run"], "`model.in_channels` must be at most 65536"),
        ("train", ["model.weights=a\nb"], "`model.weights`: a b is not an exported model"),
        ("train", ["data.shards=x\x1b[2J"], "'x\\x1b[2J' is neither a folder of shards"),
        ("train", ["data.shards=" + "b/" * 3000], "a path among the settings cannot be looked at (File name too long"),
        ("train", ["run.root=" + "a" * 300], "a path among the settings cannot be looked at (File name too long"),
        ("train", ["model.weights=run_deep/model"], "nested too deeply"),
        ("train", ["parallel.ds_config=file_deep.json"], "is not valid JSON (nested too deeply)"),
        ("train", ["data.shards=index.json_deep"], "nested too deeply"),
        ("export", ["run=" + "a" * 300, "out=x"], "a path cannot be looked at"),
        ("shards", ["source=folder", "src=loop_a", "out=o"], "`data.src`: there is no folder loop_a"),
        ("score", ["run=run_object"], "none of the 1 checkpoints in run_object/checkpoints is intact"),
        ("score", ["weights=manifest.json_list"], "checkpoint manifest.json_list is damaged: AttributeError"),
        ("score", ["--replay", "config.json_empty"], "decisions.jsonl is missing"),
        ("score", ["--replay", "decisions.jsonl_deep"], "line 1 is damaged (nested too deeply)"),
        ("report", ["a\x1b\nb"], "a\\x1b b is not a folder"),
    ],
)
def test_what_was_found_stays_mended(command, given_words, told, places):
    with inside(places[0]):
        assert told in refused(command, given_words)
