"""Files that were whole and had one value changed: every command uses them or says what is wrong with them."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from entprune_ds.atomic import file_sha256
from entprune_ds.config import RunConfig, to_dict, to_yaml
from entprune_ds.engine.state import KEYS
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.decision import PruneDecision
from tests.fuzz_cases import QUICK, inside, refused
from tests.test_policy import decided
from tests.tiny import MODEL, tiny_config

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from([10**30, -(10**30), 2**63, 10**400, float("nan"), float("inf"), 1e308]),
    st.sampled_from(["", "\x00", "\ud800", "a\nb", "../x", "9" * 5000]),
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4
)  # fmt: skip
FILES = {
    "shards/index.json": {
        "train preset=digits data.shards=shards model.weights=missing": "missing is not an exported model",
        "train data.shards=export data.val_shards=shards": "export/index.json does not|`data.val_shards`: shards",
        "score weights=export data.shards=shards": "holds examples of shape [1, 8, 8]|has 10 classes",
        "evaluate weights=missing data.shards=shards": "missing is not an exported model|`data.val_shards` is missing",
        "encode out=text/x sample.vae=missing data.shards=shards": "VAE missing is neither a folder nor",
        "compare preset=digits data.shards=shards target_depth=2 base=missing": "missing is not an exported model",
    },
    "export/config.json": {
        "train model.weights=export data.shards=missing": "`data.shards`: 'missing'|Make them equal",
        "score weights=export": "`data.shards` is empty",
        "sample weights=export out=text/x": "`out`: text is a file",
        "evaluate weights=export": "`data.shards` is missing",
        "export src=export out=text/x": "cannot write the export",
        "export src=export out=text/x.pt format=official": "cannot write the export",
        "import src=export out=text/x": "cannot read export, or cannot write text/x",
    },
    "run/config.yaml": {
        "train preset=run/config.yaml data.shards=missing": "`data.shards`",
        "score run=run data.shards=": "`data.shards` is empty",
        "sample run=run out=text/x": "`out`: text is a file",
        "evaluate run=run data.shards=": "`data.shards` is missing",
        "report run": "",
    },
    "run/checkpoints/step_00000001/manifest.json": {
        "train preset=run/config.yaml data.shards=missing": "`data.shards`",
        "train preset=run/config.yaml data.shards=x prune.rollback=step_1": "data.shards|to undo",
        "score run=run data.shards=": "`data.shards` is empty",
        "export run=run out=text/x": "cannot write the export",
        "export run=run weights=raw out=text/x": "cannot write the export",
    },
    "ds.json": {
        "train parallel.ds_config=ds.json": "`data.shards` is empty",
        "train preset=digits data.shards= parallel.ds_config=ds.json --dry-run": "",
    },
    "diffusers/config.json": {
        "import src=diffusers out=text/x": "diffusers",
        "train model.weights=diffusers": "`data.shards`|diffusers",
        "export src=diffusers out=text/x": "diffusers",
    },
    "run/decisions.jsonl": {"score --replay run": "", "report run": ""},
    "run/metrics.jsonl": {"report run": ""},
    "run/evaluation.json": {"report run": ""},
}
"""{words that read the file: all that they are told when it is whole}: enough that nothing is started."""
EITHER = ("report", "score --replay", "--dry-run")
"""Commands that may find nothing wrong."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits) -> tuple[Path, dict[str, Any]]:
    """A folder of files in order, and what each of FILES holds."""
    root = tmp_path_factory.mktemp("whole")
    config = tiny_config()
    model = DiT(MODEL)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    shutil.copytree(Path(digits) / "train", root / "shards")
    write_export(root / "export", Source(MODEL, weights.__getitem__, {"weights": "ema", "step": 1}))
    shutil.copytree(root / "export", root / "run" / "model")
    step = root / "run" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    save_file(
        {f"{key}/{n}": w.flatten().clone() for n, w in weights.items() for key in KEYS},
        step / "rank_00000.safetensors",
    )
    part = step / "rank_00000.safetensors"
    ranges = [[n, 0, w.numel()] for n, w in weights.items()]
    files = [{"name": part.name, "bytes": part.stat().st_size, "sha256": file_sha256(part), "ranges": ranges}]
    manifest = {
        "format": 1, "step": 1, "kept_blocks": list(MODEL.blocks), "block_widths": [], "adam_step": 1, "ema_count": 1,
        "shapes": {n: list(w.shape) for n, w in weights.items()}, "files": files, "record": {"config": to_dict(config)},
    }  # fmt: skip
    (root / "diffusers").mkdir()
    described = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16,
    "in_channels": 4,
                 "out_channels": 8, "num_layers": 2, "sample_size": 4, "patch_size": 2,
                 "num_embeds_ada_norm": 3}  # fmt: skip
    save_file({"x": torch.zeros(1)}, root / "diffusers" / "diffusion_pytorch_model.safetensors")
    zero = {"stage": 1, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    figures = {
        "pruned": {"fid": 1.0, "depth": 2, "original_depth": 4, "parameters": 7, "latency_ms": {"1": 2.0}},
        "protocol": {"num_samples": 3},
    }
    held = {
        "shards/index.json": json.loads((root / "shards" / "index.json").read_text()),
        "export/config.json": json.loads((root / "export" / "config.json").read_text()),
        "run/config.yaml": yaml.safe_load(to_yaml(replace(config, model=MODEL, run=RunConfig(name="run", root=".")))),
        "run/checkpoints/step_00000001/manifest.json": manifest,
        "ds.json": {"zero_optimization": zero, "bf16": {"enabled": False}},
        "diffusers/config.json": described, "run/decisions.jsonl": decided()[0].to_json(),
        "run/metrics.jsonl": {"step": 1, "time": 1.0, "train/loss": 0.5, "train/depth": 4},
        "run/evaluation.json": figures,
    }  # fmt: skip
    (root / "text").write_text("not a folder")
    for name, values in held.items():
        write(root / name, values)
    return root, held


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.name == "decisions.jsonl" and isinstance(values, dict) and "digest" in values:
        with contextlib.suppress(Exception):  # where it can have a digest, it gets the right one
            fields = {k: v for k, v in values.items() if k != "digest"}
            values = values | {"digest": PruneDecision(**fields).digest}
    path.write_text(json.dumps(values))  # JSON is YAML, too


@st.composite
def changed(draw: st.DrawFn, values: Any) -> Any:
    """The values with one or two of them replaced, or taken out."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 2))):
        place, path = values, draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
        for number in path:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[number % len(keys)]
            if isinstance(place[key], (dict, list)) and place[key] and number != path[-1]:
                place = place[key]
                continue
            if draw(st.booleans()) or isinstance(place, list):
                place[key] = draw(anything)
            else:
                del place[key]
            break
    return values


def check(words: str) -> str:
    command, *rest = words.split()
    return refused(command, rest, (0, 1, 2) if any(either in words for either in EITHER) else (2,))


def check_change(name: str, data: st.DataObject, whole: tuple[Path, dict[str, Any]]) -> None:
    root, held = whole
    words = data.draw(st.sampled_from(sorted(FILES[name])))
    values = data.draw(changed(held[name]))
    with inside(root):
        try:
            write(root / name, values)
            check(words)
        finally:
            write(root / name, held[name])


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_not_what_is_wrong(name, whole):
    """Otherwise the tests below would change files that nobody reads."""
    with inside(whole[0]):
        for words, expected in FILES[name].items():
            lines = [line for line in check(words).splitlines() if line.startswith("error: ")]
            parts = expected.split("|") if expected else []
            assert all(any(part in line for line in lines) for part in parts), (words, lines)
            assert all(any(part in line for part in parts) for line in lines), (words, lines)


def fuzz(name: str, whole: tuple[Path, dict[str, Any]], examples: int) -> None:
    @settings(**QUICK, max_examples=examples)
    @given(data=st.data())
    def change(data: st.DataObject) -> None:
        check_change(name, data, whole)

    change()


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_used_or_refused_on_one_line_each(name, whole):
    fuzz(name, whole, 2 if all(words.startswith("report") for words in FILES[name]) else 8)


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_many_changed_files(name, whole):
    fuzz(name, whole, 500)


@pytest.mark.parametrize(
    "change",
    [
        {"kept_blocks": [None, 1, 2, 3]}, {"kept_blocks": [0, 1, 99]}, {"record": 3}, {"shapes": {}}, {"files": []},
        {"block_widths": [[0]]},
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_one_error(change, whole):
    root, held = whole
    name = "run/checkpoints/step_00000001/manifest.json"
    with inside(root):
        try:
            write(root / name, held[name] | change)
            assert "step_00000001 cannot be used: its manifest does not fit" in check("export run=run out=text/x")
            if change != {"files": []}:  # which is found when the values are read
                assert "its manifest does not fit" in check("score run=run data.shards=")
        finally:
            write(root / name, held[name])


def test_a_manifest_without_its_step_is_a_damaged_checkpoint(whole):
    root, held = whole
    name = "run/checkpoints/step_00000001/manifest.json"
    with inside(root):
        try:
            write(root / name, held[name] | {"step": None})
            assert "is damaged and is not used: manifest.json has the step None" in check("export run=run out=text/x")
        finally:
            write(root / name, held[name])


@pytest.mark.parametrize("change", [{"zero_optimization": {"reduce_bucket_size": None}}, {"data_types": [1]}])
def test_parts_of_a_deepspeed_file_that_are_of_another_kind(change, whole):
    with inside(whole[0]):
        write(whole[0] / "odd.json", change)
        assert "`parallel.ds_config`: odd.json: " in check("train parallel.ds_config=odd.json")
