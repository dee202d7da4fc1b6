"""As much of a W&B server as `wandb sync` needs: runs that can be resumed, history, uploaded files. Kept in memory."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Received:
    """What has arrived."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.history: dict[str, dict[int, dict]] = {}
        """{run id: {line: row}}."""
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[tuple[str, str], dict] = {}
        """{(type, name): metadata}."""
        self.problems: list[str] = []

    def bucket(self, name: str) -> dict[str, Any] | None:
        """A run as the client asks for it before it resumes."""
        lines = self.history.get(name, {})
        tail = json.dumps([json.dumps(lines[max(lines)])] if lines else [])
        numbers = dict(historyLineCount=len(lines), logLineCount=0, eventsLineCount=0)
        texts = dict(summaryMetrics="{}", config="{}", historyTail=tail, eventsTail="[]", displayName="run")
        known = dict(id="b", name=name, tags=[], notes=None, wandbConfig='{"t": 1}', **numbers, **texts)
        return known if name in self.runs else None

    def answer(self, query: str, variables: dict[str, Any], host: str) -> dict[str, Any]:
        """Data of a GraphQL request."""
        entity = {"id": "e", "name": "me"}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "x", "entity": entity, "bucket": self.bucket(variables["name"])}}
        if "upsertBucket" in query:
            name = variables.get("name") or next(iter(self.runs))
            new, project = name not in self.runs, {"id": "p", "name": "entprune_ds", "entity": entity}
            self.runs.add(name)
            bucket = dict(id="b", name=name, displayName="run", description=None, config="{}", sweepName=None)
            return {"upsertBucket": {"bucket": bucket | dict(project=project, historyLineCount=0), "inserted": new}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"http://{host}/upload/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "createArtifact(" in query:  # said to be there already, so that no file of it is asked for
            asked = variables["input"]
            names = asked["artifactTypeName"], asked["artifactCollectionName"]
            self.artifacts[names] = json.loads(asked.get("metadata") or "{}")
            newest = {"id": "a", "versionIndex": 0}
            known = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": newest}}
            return {"createArtifact": {"artifact": known}}
        return {}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Take lines of history at their places."""
        part = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        lines = self.history.setdefault(name, {})
        for place, line in enumerate(part["content"], part["offset"]):
            if place in lines:
                self.problems.append(f"line {place} of {name} is sent twice")
            lines[place] = json.loads(line)


@contextmanager
def wandb_server() -> Iterator[tuple[str, Received]]:
    """A server of this process; yields its address and what it receives."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                data = received.answer(asked["query"], asked.get("variables") or {}, self.headers["Host"])
                answer = {"data": data}
            elif self.path.endswith("/file_stream"):
                received.stream(self.path.split("/")[-2], json.loads(body))
            elif self.path.startswith("/upload/"):
                received.files[self.path.removeprefix("/upload/")] = body
            elif "/otel/" not in self.path:  # the client's own telemetry
                received.problems.append(f"{self.command} {self.path}")
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = handle_any

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that has left is no problem; a request that cannot be answered is one."""
            if not isinstance(sys.exception(), ConnectionError):
                received.problems.append(repr(sys.exception()))

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
