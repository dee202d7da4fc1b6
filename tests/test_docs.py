"""The documents say what the code does: messages, commands, settings, links, and the list of functions."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import shlex
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from entprune_ds.cli.main import COMMANDS
from entprune_ds.config import PRESETS, Config, load_config
from entprune_ds.coordinator import CheckTimes
from entprune_ds.engine.block_norms import BlockNorms
from entprune_ds.engine.device_use import memory
from entprune_ds.engine.resize import ResizeReport
from entprune_ds.engine.step_parts import PARTS
from entprune_ds.slow_ranks import RankTime
from entprune_ds.slow_ranks import summary as rank_summary
from tests.ranks import ROOT
from tools import make_api_docs

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = [
    ROOT / "docs" / f"{name}.md"
    for name in ("CONCEPTS", "HOWTO", "CLUSTER", "TROUBLE", "REPRODUCE", "SETTINGS", "MEMORY")
]
SETTINGS = {
    f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(getattr(Config(), s.name))
}


@cache
def said() -> tuple[str, ...]:
    """Every text of the package that is no docstring, {} where a value goes."""
    found = []
    for path in (ROOT / "entprune_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def rows(path: Path) -> list[list[str]]:
    """Cells of the tables of a document, heads and rules left out."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ``")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_message_of_the_trouble_shooting_is_said_by_the_package():
    listed = rows(ROOT / "docs" / "TROUBLE.md")
    assert len(listed) >= 40 and all(len(row) == 3 and all(row) for row in listed)
    fragments = [row[0].removeprefix("``").removesuffix("``").removesuffix(" ") for row in listed]
    assert len(set(fragments)) == len(fragments)
    lost = [fragment for fragment in fragments if not any(fragment in text for text in said())]
    assert lost == []


def test_the_list_of_functions_is_up_to_date():
    path = ROOT / "docs" / "API.md"
    changes = list(
        difflib.unified_diff(path.read_text().splitlines(), make_api_docs.document().splitlines(), lineterm="", n=0)
    )
    assert changes[:10] == [], "python tools/make_api_docs.py writes it"


def test_the_list_of_functions_finds_what_is_public(tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    (tmp_path / "cli").mkdir()
    code = '"""A module. More."""\ndef f(a, *b, c=1, **d):\n    """Does it. Well."""\ndef _g():\n    """No."""\n'
    code += 'def h():\n    pass\nclass K:\n    """A thing; such."""\n'
    for name in ("top.py", "room/inner.py", "cli/command.py"):
        (tmp_path / name).write_text(code)
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr(make_api_docs, "PACKAGE", tmp_path)
    listed = make_api_docs.document().split("\n## ", 1)[1].splitlines()
    inside = ["- `f(a, *b, c, **d)`: Does it", "- `class K`: A thing", ""]
    assert listed == [
        "entprune_ds",
        "",
        "**`top`** A module",
        "",
        *inside,
        "",
        "## entprune_ds/room",
        "",
        "**`room.inner`** A module",
        "",
        *inside,
    ]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_files_of_a_document_are_there(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for anchor_file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
        heads = re.findall(r"^#+ (.*)$", ((path.parent / anchor_file) if anchor_file else path).read_text(), re.M)
        assert anchor in [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in heads], anchor
    for place in re.findall(r"`((?:docs|tests|tools)/[\w./]+\.(?:py|md|sh|png))`", text):
        assert (ROOT / place).is_file(), place


def commands(text: str) -> list[list[str]]:
    """The command lines of the fenced blocks of a document, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip() for kind, block in blocks if not kind for line in block.replace("\\\n", " ").splitlines()]
    ours = [line for line in lines if re.search(r"entprune[-_]ds[ .]|slurm/\w+\.sh", line) and not line.startswith("#")]
    return [shlex.split(line, comments=True) for line in ours]


@pytest.mark.parametrize("path", [p for p in DOCS if p.name != "LOG.md"], ids=lambda path: path.name)
def test_the_commands_of_a_document_have_settings_presets_and_names_that_exist(path):
    for words in commands(path.read_text()):
        if "entprune-ds" in words:
            assert words[words.index("entprune-ds") + 1] in {*COMMANDS, "COMMAND"}, words
        for module in (w for w in words if w.startswith("entprune_ds.")):
            assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), words
        for key, _, value in (w.partition("=") for w in words if re.match(r"[a-z]+\.[a-z_0-9]+=", w)):
            assert key in SETTINGS, words
            assert value != "" or key == "data.shards", words
        for name in (w.removeprefix("preset=") for w in words if w.startswith("preset=")):
            assert name in ("...", "NAME") or name.endswith(".yaml") or (PRESETS / f"{name}.yaml").is_file(), words


def test_what_a_document_says_in_running_text_about_settings_is_a_setting():
    sections = {s.name for s in dataclasses.fields(Config)}
    for path in OURS:
        for name in re.findall(r"`([a-z]+\.[a-z_]+)(?:=[^`]*)?`", path.read_text()):
            known = name in SETTINGS or name.split(".")[0] not in sections or (ROOT / "entprune_ds" / name).exists()
            assert known, (path.name, name)


def test_the_picture_is_one_that_browsers_draw():
    root = ElementTree.parse(ROOT / "docs" / "dataflow.svg").getroot()
    assert root.tag.endswith("svg") and root.get("viewBox") == "0 0 900 560" and not list(root.iter("script"))
    texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
    assert {"tar shards", "rank 0 decides", "live resize, in the same processes"} <= set(texts)


def fenced(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_the_preset_of_the_how_to_is_a_preset(tmp_path):
    [text] = fenced(ROOT / "docs" / "HOWTO.md", "yaml")
    (tmp_path / "birds.yaml").write_text(text)
    config = load_config([f"preset={tmp_path / 'birds.yaml'}", "prune.target_depth=14"])
    assert (config.model.num_classes, config.model.depth, config.train.num_steps) == (200, 28, 50_000)


def test_the_labels_of_flowers_are_made_as_the_document_says(tmp_path, monkeypatch):
    [code] = fenced(ROOT / "docs" / "REPRODUCE.md", "python")
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[77, 1, 102]], dtype=np.uint8)})
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "REPRODUCE.md", "exec"), {})
    made = (tmp_path / "labels.csv").read_text().splitlines()
    assert made == ["path,label", "jpg/image_00001.jpg,76", "jpg/image_00002.jpg,0", "jpg/image_00003.jpg,101"]


# ---------------------------------------------------------------- figures of a run

GROUPS = "train|val|data|ranks|prune|score|samples|eval"
MADE = (  # names whose ends are fields of these
    *ResizeReport(0.0, 0.0, 0, 0, 0).metrics(),
    *rank_summary([RankTime("h", 1.0, 1.0, 1.0)]),
    *(f"train/seconds_{part}" for part in (*PARTS, "other")),
    *(f"train/{name}/block_NN" for name in BlockNorms._fields),
    *memory(),
    *(f"train/validation_loss{suffix}" for suffix in ("", "_ema")),
    *(f"prune/{part.name}_seconds" for part in dataclasses.fields(CheckTimes)),
)


def figures_of_the_code() -> set[str]:
    """Names of the figures that the package logs, {} where a value goes."""
    logged = {text for text in said() if re.fullmatch(rf"({GROUPS})/[a-z{{][\w{{}}/]*", text)}
    return {text for text in logged if not text.endswith(("/", "_"))} | set(MADE)


def named(pattern: str, names: set[str]) -> bool:
    """Whether a name of the code is among those of a document, which write NN or CAPITALS where a value goes."""
    form = re.escape(pattern).replace(r"\{\}", r"[\w*]+")
    return any(re.fullmatch(form, name) for name in names)


def test_every_figure_that_is_logged_is_described_and_no_other():
    described = set(re.findall(rf"`((?:{GROUPS})/[\w*/]+)`", (ROOT / "docs" / "METRICS.md").read_text()))
    logged = figures_of_the_code()
    assert len(logged) > 50 and sorted(name for name in logged if not named(name, described)) == []
    for path in DOCS:
        for name in re.findall(r"`((?:train|val|prune|ranks)/[a-z_]+)`", path.read_text()):
            assert any(named(form, {name}) for form in logged), (path.name, name)
