"""The monitor: metrics.jsonl, the real offline W&B client, figures, and report.html."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import logging
import math
import os
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from entprune_ds.cli import evaluate
from entprune_ds.cli import report as report_cli
from entprune_ds.cli.common import with_run
from entprune_ds.config import Config, MonitorConfig, load_config
from entprune_ds.monitor import metrics, numbers, plots, style, tables, wandb_run
from entprune_ds.monitor.interface import NullMonitor
from entprune_ds.monitor.records import decision_of, decisions_of, series
from entprune_ds.monitor.report import build_report
from entprune_ds.monitor.run_folder import read_run_folder
from entprune_ds.run_files import open_folder

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x^$ \ud800"
PLAIN = Config(monitor=MonitorConfig(wandb=False))


# ---------------------------------------------------------------- a synthetic run


def decision_row(
    check: int = 0, step: int = 50, kept=(0, 1, 2, 3), dropped=(1, 2), criterion: str = "ced", **more
) -> dict:
    order = [*dropped, *(b for b in kept if b not in dropped)]
    scores = {str(b): {"value": 0.1 * (i + 1), "standard_error": 0.01} for i, b in enumerate(order)}
    reversed_ = {b: {"value": -s["value"], "standard_error": 0.01} for b, s in scores.items()}
    after = [b for b in kept if b not in dropped]
    candidate = dict(kept_blocks=after, zico_mean=1.25, zico_sum=48.5, zico_rank=1)
    return {
        "check": check, "step": step, "criterion": criterion, "kept_before": list(kept), "dropped": list(dropped),
        "kept_blocks": after, "order": order, "scores": {criterion: scores, "loss": reversed_},
        "candidates": [
            dict(candidate, depth=len(kept), ntk=None, ntk_rank=2, total=3.0),
            dict(candidate, depth=len(after), ntk=12.5, ntk_rank=1, total=2.0),
        ],
        "chosen_depth": len(after), "forced": False, "reason": "lowest rank sum", "score_only": False,
        "digest": "ab" * 32,
    } | more  # fmt: skip


def write_run(folder: Path, decisions: list[dict] | None = None, text: str = "plain") -> Path:
    """A run folder; `text` turns up in every place that holds a string."""
    (folder / "samples").mkdir(parents=True)
    rows = [
        {"step": s, "time": 1.7e9 + s, "train/loss": 1 / (s + 1), "train/validation_loss": 0.5}
        for s in range(0, 100, 2)
    ]
    decisions = [decision_row()] if decisions is None else decisions
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "decisions.jsonl").write_text("".join(json.dumps(d) + "\n" for d in decisions))
    figures = {
        "depth": 4,
        "original_depth": 4,
        "parameters": 1234567,
        "fid": 5.125,
        "class_accuracy": 0.981,
        text: text,
    }
    evaluation = {
        "base": figures | {text: text, "latency_ms": {"1": 2.0, "64": 80.0}},
        "pruned": figures | {"depth": 2, "parameters": 617283, "fid": 7.875, "latency_ms": {"1": 1.1, "64": 41.0}},
        "speedup": {"1": 1.818, "64": 1.951},
        "speedup_iqr": {"64": {"q25": 1.901, "q75": 2.013}},
        "protocol": {"num_samples": 1797, "tf32": False, "vae": None, text: text},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    env = {
        "command": f"python -m train run.name={text}",
        "commit": "0123abcd",
        "versions": {"torch": "2.15", text: text},
    }
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "summary.json").write_text(json.dumps({"resizes": 1, text: text}))
    (folder / "config.yaml").write_text(f"run: {text}\n".encode(errors="replace").decode())
    name = "".join(c for c in text if c not in "/\ud800")
    for file in ("base_final.png", f"step_2_{name}.png", "step_10.png", "final.png"):
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "samples" / file)
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- metrics.jsonl


def test_every_line_is_on_disk_at_once_and_not_finite_values_are_null(tmp_path):
    monitor = metrics.open_monitor(PLAIN, tmp_path, enabled=True)
    monitor.log(3, {"train/loss": math.nan, "train/lr": math.inf, "train/depth": 8, "train/grad_norm": np.float64(0.5)})
    (line,) = lines(tmp_path / "metrics.jsonl")  # before finish
    assert line.pop("time") > 1.7e9
    assert line == {"step": 3, "train/loss": None, "train/lr": None, "train/depth": 8, "train/grad_norm": 0.5}
    monitor.finish()
    monitor.finish()


@pytest.mark.parametrize("values", [{"a/b": "1"}, {"a/b": True}, {"a/b": np.float32(1)}, {"step": 1}, {"time": 1.0}])
def test_what_is_no_plain_number_or_would_overwrite_a_field_is_refused(tmp_path, values):
    monitor = metrics.open_monitor(PLAIN, tmp_path, enabled=True)
    with pytest.raises((TypeError, ValueError), match=next(iter(values))):
        monitor.log(0, values)
    assert lines(tmp_path / "metrics.jsonl") == []
    monitor.finish()


def test_a_rank_that_is_not_enabled_writes_nothing(tmp_path):
    monitor = metrics.open_monitor(Config(), tmp_path, enabled=False)
    monitor.log(0, {"train/loss": 1.0})
    monitor.image(0, "samples/x", tmp_path / "none.png")
    monitor.decision(decision_row())
    monitor.summary({"fid": 1.0})
    monitor.artifact(tmp_path, "model", "model")
    monitor.finish(1)
    assert isinstance(monitor, NullMonitor) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("score_only, depth, removed", [(False, 2, 2), (True, 4, 0)])
def test_a_decision_logs_the_depth_that_is_really_there(tmp_path, score_only, depth, removed):
    monitor = metrics.open_monitor(PLAIN, tmp_path, enabled=True)
    monitor.decision(decision_row(score_only=score_only))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["prune/depth"], line["prune/blocks_removed"]) == (50, depth, removed)
    with pytest.raises(ValueError, match="kept_before"):
        monitor.decision({"check": 0, "step": 1})
    monitor.finish()


def test_a_half_line_left_by_a_kill_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "tr')
    monitor = metrics.open_monitor(PLAIN, tmp_path, enabled=True)
    monitor.log(3, {})
    monitor.finish()
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 3


def test_rewinding_moves_later_lines_aside_and_drops_a_half_line(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.superseded.jsonl"
    assert metrics.rewind_metrics(tmp_path, 5) == 0 and not path.exists()
    path.write_bytes(b'{"step": 4}\n#damaged\n{"step":  5}\n{"step": 6}\n{"step": 5, "late": 1}\n{"step": 7}\n{"st')
    assert metrics.rewind_metrics(tmp_path, 5) == 2
    assert path.read_bytes() == b'{"step": 4}\n#damaged\n{"step":  5}\n{"step": 5, "late": 1}\n'
    assert metrics.rewind_metrics(tmp_path, 4) == 2  # a second resume appends
    assert [row["step"] for row in lines(aside)] == [6, 7, 5, 5]
    before = path.stat().st_ino
    assert metrics.rewind_metrics(tmp_path, 4) == 0 and path.stat().st_ino == before
    path.write_bytes(b'{"step": 4}\n{"st')
    assert metrics.rewind_metrics(tmp_path, 4) == 0 and path.read_bytes() == b'{"step": 4}\n'


def test_rewinding_to_a_size_also_moves_the_lines_that_a_repeated_check_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 3}\n{"step": 4}\n')
    size = metrics.metrics_size(tmp_path)
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "prune/depth": 3}\n{"step": 5}\n')
    assert metrics.rewind_metrics(tmp_path, 4, size) == 2
    assert lines(path) == [{"step": 3}, {"step": 4}]
    assert metrics.rewind_metrics(tmp_path, 4, size) == 0
    assert metrics.rewind_metrics(tmp_path, 0, 0) == 2 and path.read_bytes() == b""  # a start from step 0
    assert metrics.metrics_size(tmp_path / "none") == 0


def test_a_kill_while_rewinding_loses_no_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        metrics.rewind_metrics(tmp_path, 1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert lines(tmp_path / "metrics.superseded.jsonl") == [{"step": 2}]
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- Weights & Biases


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """The client without credentials, with its own home; warnings of our logger are kept."""
    import wandb

    for name in [n for n in os.environ if n.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # the client reads the environment once per session
    yield tmp_path
    wandb.teardown()


def wandb_records(path: Path) -> list:
    """Records of a .wandb file: 7 bytes of header, then LevelDB log blocks of 32 KiB holding protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little room for a chunk header: padding
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole record, or its last chunk
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records: list) -> list[dict]:
    items = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row} for row in items]


def test_resumes_continue_one_offline_run_and_its_file_holds_the_history(wandb_home, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "5e" * 20)
    monkeypatch.setenv("WANDB_MODE", "offline")
    checks = [decision_row(), decision_row(check=1, step=3)]
    run_dir = write_run(wandb_home / "run", checks)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (
        ["init"],
        ["commit", "--allow-empty", "-m", "a"],
        ["remote", "add", "origin", "https://u:t0ken@a.org/b"],
    ):
        subprocess.run([*git, *words], cwd=wandb_home, check=True, capture_output=True)
    monkeypatch.chdir(wandb_home)
    ids = set()
    for start in (0, 1, 2):  # steps 1 and 2 are repeated by the resumes
        monitor = metrics.open_monitor(Config(), run_dir, enabled=True)
        for step in (start, start + 1):
            monitor.log(step, {"train/loss": 10.0 + step})
        if start == 2:
            monitor.decision(checks[1])
            monitor.image(3, "samples/final", run_dir / "samples" / "final.png")
            monitor.image(3, "samples/lost", run_dir / "samples" / "lost.png")
            monitor.summary({"pruned": {"fid": 7.875}})
            monitor.artifact(run_dir / "samples", "the model!", "model")
        monitor.finish()
        ids.add((run_dir / "wandb_id.txt").read_text().strip())
    wandb.teardown()  # as at the end of a process: the client's service finishes its files
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(ids) == 1 and [f.name for f in files] == [f"run-{next(iter(ids))}.wandb"] * 3
    found = [wandb_records(f) for f in files]
    logged = [[(row["step"], row["train/loss"]) for row in history(r) if "train/loss" in row] for r in found]
    assert logged == [[(0, 10.0), (1, 11.0)], [(1, 11.0), (2, 12.0)], [(2, 12.0), (3, 13.0)]]
    last = {key: value for row in history(found[2]) for key, value in row.items()}
    assert last["score/table/_type"] == "table-file" and last["score/table/nrows"] == 4
    assert last["prune/vote/nrows"] == 2 and last["score/heat_map/_type"] == "image-file"
    assert last["score/ced/block_01"] == 0.1 and last["samples/final/_type"] == "image-file"
    assert "removed blocks 1 and 2" in last["prune/decision"] and "samples/lost/_type" not in last
    both_checks = picture(plots.score_heat_map(decisions_of(checks)[0], "ced"))
    assert (last["score/heat_map/height"], last["score/heat_map/width"]) == both_checks.shape[:2]
    artifacts = [r.artifact for r in found[2] if r.WhichOneof("record_type") == "artifact"]
    assert [a.name for a in artifacts if a.type == "model"] == ["the_model_"]
    assert json.loads((files[2].parent / "files" / last["score/table/path"]).read_text())["data"][1][3:5] == [0.1, 0.01]
    alerts = [r.alert.title for r in found[2] if r.WhichOneof("record_type") == "alert"]
    assert alerts == ["Pruning check 1: depth 2"]
    axes = [r.metric for r in found[0] if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in axes)
    (run,) = [r.run for r in found[0] if r.WhichOneof("record_type") == "run"]
    assert run.run_id in ids and run.project == "entprune_ds"
    written = [p.read_bytes() for p in wandb_home.rglob("*") if p.is_file() and ".git" not in p.parts]
    assert not [data for data in written if b"5e" * 20 in data or b"t0ken" in data]  # no secret in any file


def test_figures_of_an_evaluation_leave_the_settings_of_the_training(wandb_home, monkeypatch):
    """`evaluate run=FOLDER` itself works with other settings: other weights, a standard criterion."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ["run.name=run", f"run.root={wandb_home}", "prune.criterion=/home/me/own.py", "model.weights=/data/base"]
    trained = load_config([*given, "data.allow_pipe=true"], check=lambda config: [])
    folder = write_run(trained.run_dir)
    open_folder(trained, [], 0, [], 0).finish()
    used = load_config(with_run([f"run={folder}"], "evaluate")[0], check=lambda config: [])
    assert used.prune != trained.prune and used.model != trained.model
    time.sleep(1.1)  # folders are named by the second
    evaluate.log_figures(folder, {"pruned": {"fid": 7.875}})
    wandb_run.end_service()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    sent = []
    for records in map(wandb_records, files):
        updates = [r.run.config.update for r in records if r.WhichOneof("record_type") == "run"]
        updates += [r.config.update for r in records if r.WhichOneof("record_type") == "config"]
        sent.append({u.key: json.loads(u.value_json) for some in updates for u in some if u.key != "_wandb"})
    assert len(sent) == 2 and sent[0] == sent[1] == yaml.safe_load((folder / "config.yaml").read_text())
    assert sent[1]["model"]["weights"] == "/data/base" and sent[1]["prune"]["criterion"] == "/home/me/own.py"
    names = [r.run for records in map(wandb_records, files) for r in records if r.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in names}) == 1 and {run.display_name for run in names} == {"run"}


def test_without_credentials_the_run_is_offline_and_with_an_unreachable_server_too(wandb_home, monkeypatch, caplog):
    logging.getLogger("entprune_ds").addHandler(caplog.handler)
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    for name in ("alone", "no_server"):
        (wandb_home / name).mkdir()
        monitor = wandb_run.start_wandb(Config(), wandb_home / name)
        assert isinstance(monitor, wandb_run.WandbMonitor) and monitor.run is not None and monitor.run.offline
        assert monitor.run.settings.resume == "allow"
        monitor.finish()
        assert len(list((wandb_home / name / "wandb").glob("offline-run-*/*.wandb"))) == 1
        assert ("trying offline" in caplog.text) == (name == "no_server")
        monkeypatch.setenv("WANDB_API_KEY", "5e" * 20)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monitor.run = None
        import wandb

        wandb.teardown()


@pytest.mark.parametrize("setting", ["WANDB_MODE=disabled", "WANDB_MODE=nonsense", "id"])
def test_a_client_that_cannot_start_leaves_the_plain_copy(wandb_home, monkeypatch, setting):
    key, _, value = setting.partition("=")
    if value:
        monkeypatch.setenv(key, value)
    else:
        (wandb_home / "wandb_id.txt").write_text("../../elsewhere")
    monitor = metrics.open_monitor(Config(), wandb_home, enabled=True)
    monitor.log(1, {"train/loss": 1.0})
    monitor.finish()
    assert len(lines(wandb_home / "metrics.jsonl")) == 1 and not (wandb_home / "wandb").exists()


def test_a_failing_client_is_a_warning_told_once(tmp_path, caplog):
    class Broken:
        def log(self, values):
            raise ConnectionError("the service died")

    logger = logging.getLogger("test_monitor")
    monitor = wandb_run.WandbMonitor(Broken(), tmp_path, logger)
    for step in range(3):
        monitor.log(step, {"train/loss": 1.0})
    assert caplog.text.count("the service died") == 1


def test_credentials_are_found_in_the_environment_and_in_netrc(wandb_home, monkeypatch):
    assert not wandb_run.has_credentials()
    (wandb_home / "netrc").write_text("machine other.host login user password x\n")
    assert not wandb_run.has_credentials()
    (wandb_home / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_run.has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not wandb_run.has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_run.has_credentials()


# ---------------------------------------------------------------- figures, tables, numbers


def picture(png: bytes | None) -> np.ndarray:
    assert png is not None and len(png) < 150_000
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_figures_are_pictures_with_something_on_them():
    row = [{"step": s, "train/loss": math.exp(-s / 300) + 1e-3, "train/depth": 4} for s in range(5000)]
    name = "$x^$ \ud800\0\n"
    decisions = [decision_of(decision_row(criterion=name)), decision_of(decision_row(1, 80, (0, 3), (), name))]
    evaluation = {"base": {"fid": 1.0, "latency_ms": {"1": 2.0}}, "pruned": {"latency_ms": {"1": 1.0, "64": 3.0}}}
    drawn = [
        picture(plots.loss_curves(row, decisions)),
        picture(plots.depth_over_time(decisions, row)),
        picture(plots.depth_over_time([], row)),
        picture(plots.score_heat_map(decisions, name)),
        picture(plots.vote(decisions[0])),
        picture(plots.comparison(evaluation)),
    ]
    for image in drawn:
        assert image.shape[1] > 600 and image.std() > 10
    unmarked = picture(plots.loss_curves(row, []))
    assert (unmarked != drawn[0]).any()  # the removal is marked


def test_figures_of_nothing_are_none():
    nothing = decision_of(decision_row(candidates=[], scores={}))
    assert plots.loss_curves([{"step": 1, "train/loss": None}], []) is None
    assert plots.depth_over_time([], []) is None
    assert plots.score_heat_map([nothing], "ced") is None
    assert plots.vote(nothing) is None
    assert plots.comparison({"base": {"fid": None}, "speedup": 3}) is None


def test_scores_are_standardised_within_a_check_and_gaps_stay_gaps():
    grid = plots.standardised(np.array([[1.0, 3.0, np.nan], [5.0, 5.0, 5.0]]))
    np.testing.assert_array_equal(grid, [[-1, 1, np.nan], [0, 0, 0]])
    steps, values = style.averaged([0, 1, 2, 3], [1.0, 3.0, math.nan, 4.0], 2)
    assert steps == [0.5, 2.5] and values[0] == 2.0 and math.isnan(values[1])


def test_a_series_is_sorted_keeps_both_sides_of_a_removal_and_null_as_a_gap():
    rows = [{"step": 5, "a": 3.0}, {"step": 3, "a": None}, {"step": 5, "a": 2}, {"step": "x", "a": 1}, {"step": 4}]
    steps, values = series(rows, "a")
    assert steps == [3, 5, 5] and math.isnan(values[0]) and values[1:] == [3.0, 2.0]


def test_tables_say_what_the_scores_tell():
    decision = decision_of(decision_row())
    table = tables.score_table(decision)
    assert table.columns == ("block", "removed", "place", "ced", "ced standard error", "loss", "loss standard error")
    assert table.rows[1] == (1, True, 1, 0.1, 0.01, -0.1, 0.01) and table.rows[0][:3] == (0, False, 3)
    assert tables.vote_table(decision).rows[0] == (4, False, None, 1.25, 48.5, 2.0, 1.0, 3.0, None, None, "0 3")
    assert tables.correlations(decision).spearman[0] == pytest.approx((1, -1))
    near = "block 2, and first to stay, block 0: 7.1 standard errors apart, clearly"  # 0.1 / hypot(0.01, 0.01)
    assert near in tables.separation(decision)
    wide = {b: {"value": v, "standard_error": 0.3} for b, v in (("1", 0.1), ("2", 0.2), ("0", 0.3), ("3", 0.4))}
    assert "not told apart" in tables.separation(decision_of(decision_row(scores={"ced": wide})))
    assert tables.separation(decision_of(decision_row(scores={}))) == ""
    assert "would remove" in tables.sentence(dataclasses.replace(decision, score_only=True))


def test_numbers_have_sensible_digits():
    shown = [numbers.sensible(v) for v in (0.0, 12.0, 1234567, 12.345, 0.012345, 1.23e-7, math.nan, 98765.4)]
    assert shown == ["0", "12", "1,234,567", "12.3", "0.0123", "1.23e-07", "–", "98,765"]
    pairs = [(0.4567, 0.0213), (123.4, 12.0), (0.5, math.nan), (1234.5, 300.0)]
    assert [numbers.with_error(*p) for p in pairs] == ["0.457 ± 0.021", "123 ± 12", "0.500", "1,234 ± 300"]
    assert [numbers.magnitude(v) for v in (640, 65432, 675.1e6)] == ["640", "65.4 k", "675 M"]
    assert numbers.block_ranges([5, 0, 1, 2, 7, 8]) == "0–2, 5, 7, 8"
    assert [numbers.blocks_text(b) for b in ([], [3], [5, 3])] == ["no block", "block 3", "blocks 3 and 5"]


BAD_ROWS = [
    {"check": "0"}, {"step": 2**60}, {"kept_before": [10**9]}, {"kept_before": [-1]}, {"dropped": None}, {"scores": []},
    {"scores": {"ced": {"x": {"value": 1}}}}, {"scores": {"ced": {"0": {"value": "1"}}}}, {"candidates": [{}]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_ROWS, ids=str)
def test_a_damaged_decision_is_refused_and_counted(wrong):
    assert decisions_of([decision_row() | wrong])[1] == 1


# ---------------------------------------------------------------- report.html


def test_the_report_shows_what_was_measured_and_how_to_reproduce_it(tmp_path):
    rows = [decision_row(), decision_row(1, 80, (0, 3), (), forced=True)]
    page = Page(build_report(write_run(tmp_path / "demo", rows)))
    for words in (
        "demo", "4 → 2", "50.0 % of the blocks removed", "1.23 M → 617 k", "5.12 → 7.88", "80 → 41", "1.95 ×",
        "Measured speed-up: 1.82 × at batch 1, 1.95 × (1.90–2.01) at batch 64.",
        "Before: base_final.png", "After: final.png", "Check 0, step 50: depth 4 → 2",
        "Removed blocks 1 and 2. Lowest rank sum",
        "2, chosen", "12.50", "invalid", "forced", "num_samples", "1797", "python -m train run.name=plain", "0123abcd",
        "versions.torch", "0.100 ± 0.010", "Kendall",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Missing or damaged" not in page.text
    assert page.text.index("step_2_plain.png") < page.text.index("step_10.png")
    assert page.tags.count("img") == 4 + 2 + 1 + 2 + 1  # samples, training, heat map, votes, comparison


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """The report of a run with nothing special about it."""
    return build_report(write_run(tmp_path_factory.mktemp("calm") / "demo"))


def test_pictures_are_in_the_order_of_the_run(tmp_path):
    names = ["step_2_before", "step_2_after", "step_10_before", "step_10_after", "final"]
    folder = write_run(tmp_path / "demo")
    for path in (folder / "samples").iterdir():
        path.unlink()
    for name in sorted(names):
        (folder / "samples" / f"{name}.png").touch()
    assert [path.stem for path in read_run_folder(folder).samples] == names


def test_the_report_is_one_file_without_requests_or_scripts(calm):
    page = Page(calm)
    linked = [
        value for key, value in page.attributes if key in ("src", "href", "srcset", "action", "data", "xlink:href")
    ]
    assert linked and all(value.startswith("data:image/png;base64,") for value in linked)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    text = calm.read_text()
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_hostile_strings_stay_text_everywhere(tmp_path, calm):
    hostile = decision_row(criterion=HOSTILE, reason=HOSTILE, digest=HOSTILE)
    hostile["scores"][HOSTILE + "2"] = hostile["scores"]["loss"]
    folder = write_run(tmp_path / HOSTILE.replace("/", "").replace("\ud800", ""), [hostile], text=HOSTILE)
    page, expected = Page(build_report(folder)), Page(calm)
    assert set(page.tags) == set(expected.tags)  # nothing that the data says becomes an element
    assert {k for k, _ in page.attributes} == {k for k, _ in expected.attributes}
    shown = HOSTILE.replace("\ud800", "?")
    assert page.text.count(shown) >= 10
    assert page.text.count("step_2_<script>") == 1


def test_values_that_were_not_measured_do_not_appear(tmp_path):
    folder = write_run(tmp_path / "demo")
    measured = {"depth": 2, "fid": 7.875, "kid": None, "latency_ms": {"1": 1.5}}
    (folder / "evaluation.json").write_text(json.dumps({"pruned": measured}))
    page = Page(build_report(folder))
    assert "7.88" in page.text and "1.50" in page.text
    for words in ("Speed-up", "speed-up", "KID", "Class accuracy", "base", "nan", "None"):
        assert words not in page.text.replace("base_final", ""), words


def test_an_empty_folder_gives_a_report_that_says_what_is_missing(tmp_path):
    page = Page(build_report(tmp_path))
    for name in ("metrics.jsonl", "decisions.jsonl", "evaluation.json", "env.json", "config.yaml", "samples/*.png"):
        assert f"{name} is missing" in page.text or f"{name} are missing" in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize(("kept", "told"), [([0, 1], False), ([0, 3], True)])
def test_figures_of_a_model_that_is_no_longer_there_are_named(tmp_path, kept, told):
    """The run went back, and ended with other blocks."""
    folder = write_run(tmp_path / "run")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["pruned"] |= {"kept_blocks": [0, 1]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"kept_blocks": kept, "step": 9}))
    problems = read_run_folder(folder).problems
    assert any("evaluation.json is of another model" in problem for problem in problems) is told


def test_damaged_files_are_counted_and_named(tmp_path):
    folder = write_run(tmp_path / "demo")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": 101, "train/loss": null}\n' + b"[" * 100_000 + b'\n{"step": 1')
    with open(folder / "decisions.jsonl", "a") as file:
        file.write('{"check": 1}\n{"check"')
    (folder / "evaluation.json").write_text("{")
    (folder / "env.json").write_text("[]")
    (folder / "samples" / "final.png").write_bytes(b"<svg onload=alert(1)>")
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()
    text = Page(build_report(folder)).text
    for words in (
        "metrics.jsonl: 4 lines are damaged", "decisions.jsonl: 1 line is damaged", "1 line is not a decision",
        "evaluation.json is damaged", "env.json does not hold a JSON object", "final.png is not a PNG file",
        "not finite at 1 logged steps, first at step 101", "summary.json cannot be read",
    ):  # fmt: skip
        assert words in text, words


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "demo")
    (folder / "report.html").write_text("old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    assert report_cli.main([str(folder)]) == 2
    assert (folder / "report.html").read_text() == "old" and not list(folder.glob(".report*"))


def test_the_command_prints_the_path_and_tells_errors_on_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "demo")
    assert report_cli.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    for words in ([], ["a", "b"], ["--what"], [str(tmp_path / "none")], [str(tmp_path / "empty")]):
        assert report_cli.main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("entprune-ds report: ") and printed.err.count("\n") == 1
    assert report_cli.main(["--help"]) == 0
    assert "entprune-ds report runs/demo" in capsys.readouterr().out
