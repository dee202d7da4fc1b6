"""Secrets in addresses reach no log, no error message and no file; and the run goes on without them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from entprune_ds.cli.common import refuse
from entprune_ds.config import load_config, to_yaml
from entprune_ds.data import web
from entprune_ds.data.index import load_index
from entprune_ds.data.latents import ShardError
from entprune_ds.data.places import Url, parse_pipe
from entprune_ds.data.web import WebFile
from entprune_ds.logs import get_logger
from entprune_ds.redact import is_redacted, redacted
from tests.ranks import ROOT, free_port, rank_environment
from tests.test_stream_web import Server, serving
from tests.test_training import losses, words

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{SECRET}@h.org:8/a/in-{{0..9}}.tar", "https://***@h.org:8/a/in-{0..9}.tar"),
        (f"https://h/a?token={SECRET}&X-Amz-Signature={SECRET}%2B==", "https://h/a?token=***&X-Amz-Signature=***"),
        (f"https://h/a?{SECRET}", "https://h/a?***"),
        (f"https://h/a?k={SECRET}'{SECRET}", "https://h/a?k=***"),
        (f"https://me:?#{SECRET}@h/a", "https://***@h/a"),
        (f"https://h/a?x=1#{SECRET}", "https://h/a?x=***"),
        (f"s3://key:{SECRET}@bucket/a", "s3://***@bucket/a"),
        (f"pipe:curl 'https://h/a.tar?t={SECRET}' | cat", "pipe:curl 'https://h/a.tar?t=***' | cat"),
        (
            f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://h/a.tar",
            "pipe:curl -H 'Authorization: ***' https://h/a.tar",
        ),
        (f'pipe:curl -sSLH "X-Mine: {SECRET} \\"{SECRET}\\"" https://h/a', 'pipe:curl -sSLH "X-Mine: ***" https://h/a'),
        (f"pipe:wget --header=PRIVATE-TOKEN:{SECRET} https://h/a", "pipe:wget --header=PRIVATE-TOKEN:*** https://h/a"),
        (f"pipe:curl -HAuthorization:'Bearer {SECRET}' -o - https://h", "pipe:curl -HAuthorization:*** -o - https://h"),
        (f"got 'pipe:curl -H \\'Cookie: {SECRET} {SECRET}\\' /a'", "got 'pipe:curl -H \\'Cookie: ***\\' /a'"),
        (f"pipe:curl -u me:{SECRET} --proxy-user 'a:{SECRET}' /a", "pipe:curl -u *** --proxy-user *** /a"),
        (f"pipe:curl -U me:{SECRET} -b s={SECRET} -x me:{SECRET}@p:1 /a", "pipe:curl -U *** -b *** -x ***@p:1 /a"),
        (f"pipe:sshpass -p {SECRET} ssh me@h cat /a", "pipe:sshpass -p *** ssh me@h cat /a"),
        (f"pipe:gpg --passphrase {SECRET} -d /a", "pipe:gpg --passphrase *** -d /a"),
        (
            f"pipe:az --account-key {SECRET} | mc --pass {SECRET} cat a/b",
            "pipe:az --account-key *** | mc --pass *** cat a/b",
        ),
        (f"pipe:rclone --webdav-pass '{SECRET}' cat r:a", "pipe:rclone --webdav-pass *** cat r:a"),
        (f"pipe:openssl enc -d -pass pass:{SECRET} -in /a", "pipe:openssl enc -d -pass pass:*** -in /a"),
        ("pipe:cat -b a.tar | tar -b 20 --bypass x me@h:a", "pipe:cat -b a.tar | tar -b 20 --bypass x me@h:a"),
        (f"pipe:A_SECRET_KEY={SECRET} DB_PASS={SECRET} cat", "pipe:A_SECRET_KEY=*** DB_PASS=*** cat"),
        (f"pipe:curl --header $'X-Auth: {SECRET}' /a", "pipe:curl --header $'X-Auth: ***' /a"),
        (f"pipe:curl -sume:{SECRET} https://h/a", "pipe:curl -su*** https://h/a"),
        (
            f"pipe:K=1 AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp /a -",
            "pipe:K=1 AWS_SECRET_ACCESS_KEY=*** aws s3 cp /a -",
        ),
        (f"pipe:wget --password={SECRET} --http-passwd '{SECRET}' /a", "pipe:wget --password=*** --http-passwd *** /a"),
        (f"pipe:curl --oauth2-bearer {SECRET}|cat", "pipe:curl --oauth2-bearer ***|cat"),
        ('pipe:curl -H "Authorization: Bearer $TOKEN" /a', 'pipe:curl -H "Authorization: Bearer $TOKEN" /a'),
        ('pipe:curl -H "A: $(cat ~/key)" -u "$ME:${IT}" /a', 'pipe:curl -H "A: $(cat ~/key)" -u "$ME:${IT}" /a'),
        ("pipe:curl -sSfH 'Accept: a/b' -u me -output x:y /a", "pipe:curl -sSfH 'Accept: a/b' -u me -output x:y /a"),
        ("pipe:TOKEN=$(cat key) aws --token-file k s3 cp /a -", "pipe:TOKEN=$(cat key) aws --token-file k s3 cp /a -"),
        ("run -u a:b -H 'X-A: b' password=1", "run -u a:b -H 'X-A: b' password=1"),
        (f'see https://a:{SECRET}@h/x, and "https://h?q={SECRET}".', 'see https://***@h/x, and "https://h?q=***".'),
        ("https://h/a@b/c.tar and /data/x?y=z", "https://h/a@b/c.tar and /data/x?y=z"),
    ],
)
def test_addresses_lose_what_is_secret_and_nothing_else(text, shown):
    assert redacted(text) == shown == redacted(shown)
    assert is_redacted(shown) == (text != shown)


def test_a_command_without_its_secret_is_not_run_and_one_with_a_variable_is(digits):
    """What config.yaml holds resumes as it is, where the secret lies in the environment."""
    names = sorted(path.name for path in Path(digits, "train").glob("*.tar"))
    for given, reads in ((f"-u me:{SECRET}", False), ("$KEY", True)):
        spec = f"pipe:cat {digits}/train/{names[0]} # {given}"
        stored = yaml.safe_load(to_yaml(load_config([f"data.shards={spec}"])))["data"]["shards"]
        assert (stored == spec) is reads
        if reads:
            assert load_index(stored, allow_pipe=True).shards[0].name == names[0]
        else:
            with pytest.raises(ShardError, match="has lost its secret"):
                load_index(stored, allow_pipe=True)


def test_no_message_shows_a_secret(tmp_path, capsys):
    for spec in (
        f"https://me:{SECRET}@h/d", f"https://h/a-{{0..1}}.tar/{{b,c}}?k={SECRET}", f"ftp://a:{SECRET}@h/x",
        f"pipe:curl https://h/d/a.tar?k={SECRET}", f"http://[{SECRET}@h/x", f"https://a:{SECRET}\u2100@h/x",
    ):  # fmt: skip
        with pytest.raises(ShardError) as caught:
            load_index(spec)
        assert SECRET not in str(caught.value)
    assert SECRET not in str(parse_pipe(f"pipe:curl https://h/d/a.tar https://x?k={SECRET}"))
    assert SECRET in parse_pipe(f"pipe:curl https://h/d/a.tar https://x?k={SECRET}").command
    assert refuse([f"`x` is https://h/?k={SECRET}"]) == 2
    get_logger().error("cannot reach %s", f"https://h/?k={SECRET}")
    printed = capsys.readouterr().err
    assert printed.count("https://h/?k=***") == 2 and SECRET not in printed
    with pytest.raises(ShardError, match=r"has lost its secret, which no run folder keeps\. Give data\.shards"):
        load_index("https://h/d?k=***")
    yaml = to_yaml(load_config([f"data.shards=https://h/d?k={SECRET}", f"data.val_shards=https://u:{SECRET}@h/d"]))
    assert SECRET not in yaml and "shards: https://h/d?k=***" in yaml


def test_the_target_of_a_redirection_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "BACKOFF", 0.001)
    with serving(Server(tmp_path)) as server, pytest.raises(ShardError) as caught:
        WebFile(Url(f"{server.url}/moved.tar", f"file://h/x?k={SECRET}")).read_all()
    assert "file://h/x?k=***" in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.full
def test_a_run_whose_data_need_a_token_stores_it_nowhere_and_resumes(digits, tmp_path):
    """A whole training with W&B offline: not one byte of the folder or of the output holds the token."""
    with serving(Server(f"{digits}/train")) as server:
        spec = [f"data.shards={server.url}/?token={SECRET}", f"data.val_shards={digits}/val", "monitor.wandb=true"]
        short = [
            *words(digits, tmp_path, "run", "prune.target_depth=null", "data.num_workers=1", "data.allow_pipe=true"),
            *spec,
        ]
        command = [sys.executable, "-m", "entprune_ds.cli.train", *short]
        for steps in (4, 8):
            done = subprocess.run(
                [*command, f"train.num_steps={steps}"], env=rank_environment(0, 1, free_port()), cwd=ROOT,
                capture_output=True, timeout=200,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr.decode()
            assert SECRET.encode() not in done.stdout + done.stderr
    run = tmp_path / "run"
    assert sorted(losses(run)) == list(range(1, 9)) and b"resumed from" in done.stderr
    assert re.search(rb"samples 4/4  \d+ evaluations of the model", done.stderr)  # the closing grid shows how far it is
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "env.json", "manifest.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert not load_config([f"preset={run / 'config.yaml'}"]).data.allow_pipe  # or `run=FOLDER` would be refused
    assert "token=***" in json.loads((run / "env.json").read_text())["command"]
