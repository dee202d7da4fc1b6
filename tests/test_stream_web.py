"""Shards on an http server that fails: retries, Range, checksums; and what is refused."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest

from entprune_ds.cli.encode import main as encode
from entprune_ds.cli.evaluate import evaluate
from entprune_ds.config import ConfigError, load_config
from entprune_ds.data import web
from entprune_ds.data.index import from_json, load_index, to_json
from entprune_ds.data.latents import ShardError
from entprune_ds.data.places import Url, parse_pipe, parse_url
from entprune_ds.data.stream import Stream, read_all
from entprune_ds.data.web import WebFile
from tests.test_data import flip
from tests.test_stream import EPOCH, READERS, SETTINGS, global_batches, same, write


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and fails on demand; counts what was asked for."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.asked = Path(folder), True, Counter()
        self.refusals, self.cuts = {}, {}
        """name -> statuses still to answer with; name -> bytes after which connections still to come are cut."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/data"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET of /data/NAME, with Range where the server allows."""

    def do_GET(self):
        server = self.server
        path, _, query = self.path.partition("?")
        name = unquote(path.removeprefix("/data/"))
        server.asked[name] += 1
        if server.refusals.get(name):
            return self.send_error(server.refusals[name].pop(0))
        if name == "moved.tar":
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
            return None
        if not (server.folder / name).is_file():
            return self.send_error(404)
        content = (server.folder / name).read_bytes()
        start = 0
        asked_range = self.headers.get("Range")
        if server.ranges and asked_range:
            start = int(asked_range.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = server.cuts[name].pop(0) if server.cuts.get(name) else None
        self.wfile.write(content[start:][:cut])
        return None

    def log_message(self, *_):
        """Quiet."""


@contextmanager
def serving(server):
    """The server at work."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path):
    with serving(Server(write(tmp_path / "d").folder)) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Short waits."""
    monkeypatch.setattr(web, "BACKOFF", 0.001)
    monkeypatch.setattr(web, "TIMEOUT", 5.0)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_server_gives_the_same_batches(server, ranges, monkeypatch):
    server.ranges = ranges
    monkeypatch.setattr(web, "ATTEMPTS", 4)  # fewer than the faults of one file: what counts is those in a row
    server.refusals = {"index.json": [503], "shard-000003.tar": [500, 502, 429], "shard-000007.tar": [500]}
    server.cuts = {"shard-000003.tar": [700, 5000, 0, 9000], "shard-000011.tar": [20000], "index.json": [100]}
    local, end = global_batches(load_index(server.folder), EPOCH)
    remote, state = global_batches(load_index(server.url), EPOCH, verify=True)
    assert same(remote, local) and state == end
    assert server.asked["shard-000003.tar"] >= 8 and not any(server.refusals.values()) and not any(server.cuts.values())


def test_workers_read_from_a_server_and_a_resume_goes_on(server):
    local, end = global_batches(load_index(server.folder), EPOCH)
    server.cuts = {"shard-000003.tar": [700], "shard-000011.tar": [20000]}
    pattern = f"{server.url}/shard-{{000000..000024}}.tar?token=a%20b"
    head, state = global_batches(load_index(pattern), 9, num_workers=1, verify=True)
    tail, last = global_batches(load_index(pattern), EPOCH - 9, dp_size=2, state=state)
    assert same(head + tail, local) and last == end


def test_what_stays_broken_is_an_error_with_a_remedy_and_the_cursor_stays(server, monkeypatch):
    monkeypatch.setattr(web, "ATTEMPTS", 3)
    victim = Stream(server.folder, **SETTINGS).readers[5].shards[1]  # the second shard of a reader
    for fault, message in (
        ({"refusals": {victim.name: [503] * 3}}, rf"{victim.name} cannot be read: .*503.* 3 attempts.*resumes"),
        ({"refusals": {victim.name: [404]}}, rf"{victim.name} cannot be read: .*404.*Check the URL"),
        ({"cuts": {victim.name: [0] * 3}}, rf"{victim.name} cannot be read: the connection ended after 0 of"),
    ):  # fmt: skip
        stream = Stream(server.url, **SETTINGS)
        vars(server).update(refusals={}, cuts={})
        vars(server).update(fault)
        with pytest.raises(ShardError, match=message):
            for _ in range(EPOCH):
                before = stream.state()
                stream.next_batch()
        assert stream.state() == before
        rest = [stream.next_batch() for _ in range(EPOCH - before["batches"])]  # the server is well again
        whole, end = global_batches(load_index(server.folder), EPOCH)
        assert same([(b.latents, b.labels) for b in rest], whole[before["batches"] :]) and stream.state() == end


def test_a_byte_that_arrives_starts_the_count_of_attempts_anew(server, monkeypatch):
    monkeypatch.setattr(web, "ATTEMPTS", 3)
    server.cuts = {"shard-000000.tar": [300] * 8}
    content = (server.folder / "shard-000000.tar").read_bytes()
    assert WebFile(Url(f"{server.url}/shard-000000.tar")).read(len(content) + 5) == content


def test_a_changed_file_is_noticed(server):
    index = load_index(server.url)
    path = server.folder / "shard-000004.tar"
    sound = path.read_bytes()
    flip(path, sound.index(b"m0055.npy") + 512 + 140)  # within the numbers: only the checksum can know
    global_batches(index, EPOCH)
    with pytest.raises(ShardError, match=r"shard-000004.tar is damaged: its SHA-256"):
        global_batches(index, EPOCH, verify=True)
    path.write_bytes(sound[:-512])
    with pytest.raises(
        ShardError, match=rf"is truncated or changed: {len(sound) - 512} bytes, the index says {len(sound)}"
    ):
        global_batches(index, EPOCH)


def test_only_the_web_is_opened_and_tokens_are_not_shown(server):
    secret = server.folder.parent / "secret"
    secret.write_text("x")
    for target in (f"file://{secret}", "ftp://127.0.0.1:1/x", "data:,x"):
        with pytest.raises(ShardError, match="cannot be read"):
            WebFile(Url(f"{server.url}/moved.tar", target)).read_all()
    with pytest.raises(ShardError) as caught:
        load_index(f"{server.url}/nowhere?token=abc")
    assert "nowhere/index.json cannot be read" in str(caught.value) and "abc" not in str(caught.value)
    assert WebFile(Url(f"{server.url}/moved.tar", f"{server.url}/index.json")).read_all().startswith(b"{")


@pytest.mark.parametrize("spec", ["http://", "http://user:word@host/d", "http://h/a-{0..1}.tar/{b,c}", "https://h/x#y"])
def test_addresses_that_cannot_be_meant_are_refused(spec):
    with pytest.raises(ShardError, match="Correct it"):
        load_index(spec)


def test_places_and_the_index_survive_the_way_to_a_worker(server):
    url = parse_url("https://h.org:8443/a b/c.tar?k=v&x={1}")
    assert (url.name, str(url.parent), str(url)) == ("c.tar", "https://h.org:8443/a b", "https://h.org:8443/a b/c.tar")
    assert (url.parent / "d e").address == "https://h.org:8443/a%20b/d%20e?k=v&x=%7B1%7D"
    for spec in (server.folder, server.url, f"{server.url}/shard-{{000001..000012}}.tar"):
        index = load_index(spec)
        assert from_json(to_json(index)) == index
        assert len(index.shards) >= READERS
    assert len(read_all(server.url)[1]) == 317


# ---------------------------------------------------------------- shell commands


def test_commands_run_only_where_they_are_allowed(server, tmp_path):
    pattern = f"pipe:cat {server.folder}/shard-{{000000..000024}}.tar | cat"
    with pytest.raises(ShardError, match=r"runs a shell.*data.allow_pipe=true on the command line"):
        load_index(pattern)
    local, end = global_batches(load_index(server.folder), EPOCH)
    index = load_index(pattern, allow_pipe=True)
    assert from_json(to_json(index)) == index
    piped, state = global_batches(index, EPOCH, verify=True)
    assert same(piped, local) and state == end
    for spec in (
        "pipe:ls",
        "pipe:cat 'x/a.tar'",
        "pipe:cat a.tar",
        "pipe:cat x/a.tar y/b.tar",
        "pipe:touch x/$(a).tar",
    ):
        with pytest.raises(ShardError, match="does not name shards"):
            load_index(spec, allow_pipe=True)


def test_the_other_readers_of_shards_follow_the_same_rule(server, digits, tmp_path):
    pattern = f"pipe:cat {server.folder}/shard-{{000000..000024}}.tar"
    assert len(read_all(pattern, allow_pipe=True)[1]) == 317
    with pytest.raises(ShardError, match="which runs a shell"):
        read_all(pattern)
    gone = f"pipe:cat {tmp_path}/gone/shard-{{000000..000004}}.tar"
    for words, refused, allowed in (
        ([f"data.shards={pattern}"], "runs a shell", "is made for digits"),
        ([f"data.shards={digits}/train", f"data.val_shards={gone}"], "runs a shell", "gone/index.json` ended with"),
    ):
        for more, message in (([], refused), (["data.allow_pipe=true"], allowed)):
            with pytest.raises(ValueError, match=message):
                evaluate(load_config([*words, *more]), cache=tmp_path)
    words = [f"data.shards={pattern}", f"out={tmp_path / 'out'}", "sample.vae=x", "--dry-run"]
    assert encode(words) == 2 and encode([*words, "data.allow_pipe=true"]) == 0


def test_a_failing_command_is_an_error(server):
    with pytest.raises(ShardError, match=r"index.json > /dev/full` ended with status"):
        load_index(f"pipe:cat {server.folder}/shard-{{000000..000024}}.tar > /dev/full", allow_pipe=True)
    index = load_index(f"pipe:head -c 9000 {server.folder}/shard-{{000000..000024}}.tar", allow_pipe=True)
    with pytest.raises(ShardError, match=r"is truncated or changed: 9000 bytes, the index says"):
        global_batches(index, EPOCH)


def test_a_name_in_an_index_cannot_become_a_command():
    folder = parse_pipe("pipe:cat /d/a.tar").parent
    assert (folder / "a;touch x.tar").command == "cat /d/'a;touch x.tar'"


def test_a_preset_cannot_allow_commands(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("data: {allow_pipe: true}")
    with pytest.raises(ConfigError, match="Take it out"):
        load_config([f"preset={preset}", "data.allow_pipe=true"])
    assert load_config(["data.allow_pipe=true"]).data.allow_pipe
