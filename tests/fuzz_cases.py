"""What a user may give by mistake or malice: words, paths and files; and a call of a command."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck
from hypothesis import strategies as st

from entprune_ds.cli import main as cli
from entprune_ds.config import Config

QUICK = dict(
    deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip
LONGEST = 30
"""Seconds that a refusal may take; one that hangs is a finding."""
STARTS = ("error: ", "warning: ", "entprune-ds report: ")
"""What a line on stderr begins with: one line for each problem."""

KEYS = [f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(getattr(Config(), s.name))]


class TooSlow(BaseException):
    """A command went on for longer than LONGEST; no handler of the commands catches it."""


def call(command: str, words: list[str]) -> tuple[int, str, str]:
    """Run a command in this process, with the streams of a terminal; what it raises passes.

    Returns:
        Exit status, stdout and stderr.
    """
    out, err = io.BytesIO(), io.BytesIO()
    stdout = io.TextIOWrapper(out, "utf-8", errors="strict", write_through=True)
    stderr = io.TextIOWrapper(err, "utf-8", errors="backslashreplace", write_through=True)

    def stop(*_: object) -> None:
        raise TooSlow(f"{command} {words} ran for more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = cli.main([command, *words])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before)
    return status, out.getvalue().decode(), err.getvalue().decode()


def refused(command: str, words: list[str], statuses: tuple[int, ...] = (2,)) -> str:
    """Run a command that must refuse its words; returns what it told.

    Args:
        statuses: the exit statuses that are documented; 0 among them allows that nothing was wrong.
    """
    status, out, told = call(command, words)
    shown = f"{command} {words}: status {status}\n{told}"
    assert status in statuses, shown
    lines = told.split("\n")[:-1]
    assert all(line.startswith(STARTS) for line in lines), shown
    assert "Traceback" not in told and all(line.isprintable() for line in lines), shown
    if status == 1 and "--replay" in words:
        same = ("the same again", "recorded without its state")
        assert any(line.startswith("check ") and not line.endswith(same) for line in out.splitlines()), out
    elif status:
        assert any(len(line.split()) > 3 and not line.startswith("warning: ") for line in lines), shown
    return told


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that whatever is written by mistake lies there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ---------------------------------------------------------------- values

VALUES = (
    "", " ", "null", "~", "true", "no", "-1", "0", "1", "3", "1e3", "1e400", "-1e400", "nan", ".nan", "inf", "-.inf",
    "9" * 25,
    "9" * 5000, "-" + "9" * 30, "0.1", "-0.0", "1_000", "0x1F", "010", "12:30:45", "1:2.5", "2026-11-20", "[]", "{}",
    "[1,2", "{a: [",
    "[[1]]", "[null]", "[[],[[]]]", "[0,0]", "[-1]", "[3,2,1]", "{a: 1}", "{1: 2}", "{null: 1}", "{[1]: 2}",
    "{? {a: b} : c}",
    "[" * 40, "[" * 5000, "{a: " * 400, "a: b: c", "a: 1\n---\nb: 2", "%YAML 9.9\n---\n1", "- 1\n- 2", "|\n x",
    "&a [*a]", "*a", "&a 1",
    "{<<: 1}", "{<<: {a: 1}}", "{<<: [1]}", "<<", "=", "!x y", "!!python/object/apply:os.system [echo]",
    "!!python/name:os.system", "!!binary aGk=",
    "!!binary x", "!!set {a}", "!!omap [a]", "!!pairs [a]", "!!timestamp x", "!!timestamp 2026-99-99", "2026-99-99",
    "!!bool x", "!!int x",
    "!!int ''", "!!float x", "!!float ''", "!!null x", "!!str [a]", "!!map [a]", "!!seq {a: 1}", "${oc.env:HOME}",
    "${model.depth}", "${",
    "\\${a}", "$" + "{a" * 30, "???", "'", '"\\x"', "\x00", '"\\0"', "\x1b[2J", "a\nb", "\r", "\u2028", "\ud800",
    "\udcff", "é", "日本", "🙂", "\u202e",
    "missing", "/dev/null", ".", "..", "/", "~user", "*", "a" * 300, "b/" * 3000, "in-{0..9}.tar",
    "in-{0..99999999999}.tar", "{a,b}{a,b}.tar",
    "x/in-{00..3}.tar", "{{{", "}{", "x/{1..}.tar", "http://", "http://[x", "https://u:p@h/x", "ftp://h/x", "s3://b/x",
    "pipe:echo x", "hdfs::x",
    "http://127.0.0.1:99999/x",
)  # fmt: skip

values = st.one_of(
    st.sampled_from(VALUES),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.sampled_from("[]{},:*&!|>'\"%@`#?- \n\ta1$"), max_size=12).map("".join),
)
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(
        [
            "",
            "preset",
            "run",
            "model",
            "out",
            "src",
            "weights",
            "prune",
            "a.b.c",
            ".",
            "model.",
            ".depth",
            "model.depth.x",
        ]
    ),
    st.sampled_from(KEYS).map(lambda k: k[:-1]),
    st.text(max_size=8),
)
words = st.one_of(
    st.builds("{}={}".format, keys, values),
    values,
    st.sampled_from(["--x", "-", "--", "--dry-runs", "--replay=x", "-x=1"]),
).filter(lambda w: w not in ("-h", "--help", "--dry-run", "--replay"))
"""Words of a command line; the switches, which change what a command does, are given where they belong."""


# ---------------------------------------------------------------- files

DEEP = "[" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""A text of 11 lines that stands for 9^12 values."""
TEXTS = {
    "empty": b"", "blank": b" \n", "binary": bytes(range(256)), "zeros": bytes(4096), "text": b"hello",
    "bom": b"\xef\xbb\xbf{}",
    "utf16": "{}".encode("utf-16"), "list": b"[1, 2]", "scalar": b"3", "null": b"null", "string": b'"x"',
    "object": b"{}",
    "nested": b'{"model": {"model": {}}}', "deep": DEEP.encode(), "deep_object": b'{"a":' * 50_000,
    "huge": b'{"format": ' + b"9" * 6000 + b"}",
    "inf": b'{"format": 1e999, "model": NaN}', "surrogate": b'{"format": "\\ud800"}', "nul": b'{"format": "\\u0000"}',
    "twice": b"{a: 1, a: 2}", "python": b"!!python/object/apply:os.system [echo]", "tag": b"a: !!timestamp x",
    "anchor": b"&a [*a]",
    "interpolation": b"run: {name: '${oc.env:HOME}'}", "two_documents": b"a: 1\n---\nb: 2",
    "control": b"run: {name: \x07}", "bomb": BOMB.encode(),
    "sections": b"model: 3\ndata: []\nprune: null\n", "code": b"prune: {criterion: evil.py}",
    "pipe": b"data: {allow_pipe: true}",
    "itself": b"base: file_itself.yaml", "keys": b"{1: 2, null: 3, true: 4, 1.5: 6}", "unhashable": b"{[1]: 2}",
    "escape": b'a: "\\x1b[2J\\n"',
    "half": b'{"format": "entprune_ds/1", "model": {"dep', "path": b'data: {shards: "\\0"}',
    "date": b"model: {depth: 2026-11-20}",
}  # fmt: skip
"""Contents of files: not JSON or YAML, or of another shape than is looked for."""


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


WEIGHTS = {
    **{f"text_{name}": data for name, data in TEXTS.items()},
    "length": safetensors({}, length=2**63), "short": b"\x08\x00\x00", "no_json": safetensors(b"hello"),
    "no_tensor": safetensors({}), "list": safetensors([1]),
    "truncated": safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(7)),
    "overlap": safetensors({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "xy"}, bytes(4)),
    "shape": safetensors({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, bytes(4)),
    "negative": safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "dtype": safetensors({"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown_dtype": safetensors({"x": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "foreign": safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "scalar": safetensors({"x_embedder.proj.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "name": safetensors({"a\nb\x1b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "pickle": b"\x80\x04cos\nsystem\n(S'echo x'\ntR.", "half_zip": b"PK\x03\x04" + bytes(40),
}  # fmt: skip
"""Contents of files of weights."""


def make_places(root: Path) -> list[str]:
    """Files and folders that no command can use, under `root`; returns their paths relative to it."""
    made = [
        "missing",
        "",
        ".",
        "/",
        "missing/x",
        "a" * 300,
        "b/" * 3000,
        "a\nb",
        "\ud800",
        "é/日本",
        "~x",
        "/proc/self/mem",
        "/dev/null",
    ]

    def write(name: str, data: bytes, listed: bool = True) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if listed:
            made.append(name)

    for name, data in TEXTS.items():
        write(f"file_{name}.yaml", data)
        write(f"file_{name}.json", data)
        for file in (
            "config.json",
            "index.json",
            "config.yaml",
            "decisions.jsonl",
            "model_index.json",
            "manifest.json",
            "plan.json",
        ):
            write(f"{file}_{name}/{file}", data, listed=False)
            made.append(f"{file}_{name}")
        run = f"run_{name}"  # a run folder whose checkpoint, settings and model are all of that kind
        write(f"{run}/config.yaml", b"run: {name: x}\n" if name == "object" else data, listed=False)
        for file in (
            "checkpoints/step_00000001/manifest.json",
            "model/config.json",
            "decisions.jsonl",
            "metrics.jsonl",
        ):
            write(f"{run}/{file}", data, listed=False)
        write(f"{run}/model/model.safetensors", data, listed=False)
        made.append(run)
    for name, data in WEIGHTS.items():
        for suffix in (".safetensors", ".pt", ".npz", ".tar"):
            write(f"weights_{name}{suffix}", data)
        write(f"export_{name}/config.json", b'{"format": "entprune_ds/1"}', listed=False)
        write(f"export_{name}/model.safetensors", data, listed=False)
        made.append(f"export_{name}")
    with zipfile.ZipFile(root / "zip.pt", "w") as file:
        file.writestr("archive/data.pkl", WEIGHTS["pickle"])
        file.writestr("archive/version", "3")
    for name in (
        "empty_folder",
        "folder/with/folders",
        "folder.yaml",
        "folder.pt",
        "folder.tar",
        "folder.npz",
        "folder.safetensors",
    ):
        (root / name).mkdir(parents=True)
        made.append(name)
    for name, target in {
        "loop_a": "loop_b",
        "loop_b": "loop_a",
        "dangling": "nowhere",
        "loop.yaml": "loop.yaml",
        "loop.pt": "loop.pt",
    }.items():
        (root / name).symlink_to(target)
        made.append(name)
    (root / "around").mkdir()
    (root / "around" / "self").symlink_to(".")
    return [*made, "zip.pt", "around", "around/self/self", "file_text.json/below", "file_text.json/", "folder/with"]
