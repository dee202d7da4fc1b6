"""The one Weights & Biases run of a training run, kept through every resume and every resize.

Monitoring never stops training: whatever the client reports becomes a warning, and metrics.jsonl goes on. All of this
runs in the thread of sender.py, so that it never slows training either.
"""

from __future__ import annotations

import contextlib
import io
import logging
import netrc
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from ..atomic import write_bytes
from ..config import Config, to_stored
from ..logs import get_logger
from . import plots, tables
from .files import read_json_lines
from .interface import Monitor, NullMonitor
from .lineage import artifact_name, used_artifacts
from .records import decision_of, decisions_of

if TYPE_CHECKING:
    import wandb

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 30.0
"""Longest wait for the server at the start; far below the time-out of the process group."""
UPLOAD_SECONDS = 60.0
"""Longest wait of the client for uploads at the end; what is left stays on disk for `wandb sync`."""
FINISH_SECONDS = 75.0
"""Longest wait for the client itself at the end."""
LOWEST_COUNTS = ("train/validation_loss", "train/validation_loss_ema")
"""Figures whose lowest value the summary shows beside the last."""


def start_wandb(config: Config, run_dir: Path) -> Monitor:
    """Open (or continue) the run; a NullMonitor and a warning when the client cannot.

    A set WANDB_MODE is respected. Otherwise the run is online where there are credentials and the server answers, and
    offline elsewhere.
    """
    log, chosen = get_logger(), os.environ.get("WANDB_MODE")
    if chosen == "disabled":
        return NullMonitor()
    modes = [None] if chosen else [None, "offline"] if has_credentials() else ["offline"]
    for mode in modes:
        try:
            run = _init(config, run_dir, mode, retry=mode != modes[0])
        except Exception as error:  # telemetry must not end a training run, whatever it raises
            then = "trying offline" if mode != modes[-1] else "metrics.jsonl goes on without it"
            log.warning("Weights & Biases could not start (%s); %s.", _one_line(error), then)
        else:
            where = f"{run.dir.removesuffix('/files')}, upload with `wandb sync`" if run.offline else run.url
            log.info("Weights & Biases run %s: %s", run.id, where)
            return WandbMonitor(run, run_dir, log)
    return NullMonitor()


def _init(config: Config, run_dir: Path, mode: Any, retry: bool) -> wandb.Run:
    import wandb

    if retry:
        _tear_down()  # the failed attempt still holds the run id
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,  # a remote's address may hold a token; env.json names the commit
        disable_code=True,
        x_disable_meta=True,  # user, e-mail and command line; env.json has what a reader needs
        x_save_requirements=False,
        init_timeout=INIT_SECONDS,
        login_timeout=INIT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
    )
    run = wandb.init(
        project=config.monitor.wandb_project,
        name=config.run.name,
        id=run_id(run_dir),
        resume="allow",
        mode=mode,
        dir=str(run_dir.resolve()),
        config=to_stored(config),
        allow_val_change=True,  # num_steps and parallel.* may differ on a resume
        settings=settings,
    )
    # Our own step axis: W&B's counter only grows, and a resume repeats the steps since the checkpoint.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for name in LOWEST_COUNTS:
        run.define_metric(name, step_metric="step", summary="min,last")
    return run


def end_service() -> None:
    """End the client's own process, when it hangs: its exit handler would wait for it for ever."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    _tear_down()


def _tear_down() -> None:
    """Let the client forget its process; of a lost one it complains, or it leaves (SystemExit) with its status."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def has_credentials() -> bool:
    """Whether the client would find a login without asking: a key or token in the environment, or an entry in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, ValueError, RuntimeError, netrc.NetrcParseError):
        return False  # absent, unreadable or no text, no home: the client could not use it either
    return entry is not None and bool(entry[2])


def run_id(run_dir: Path) -> str:
    """The id of the W&B run, drawn once and kept in the run folder.

    Raises:
        ValueError: the file holds something else.
    """
    path = run_dir / ID_FILE
    if not path.exists():
        write_bytes(path, (secrets.token_hex(8) + "\n").encode())
    text = path.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise ValueError(f"{path} does not hold a run id. Delete it to start a new W&B run.")
    return text


class WandbMonitor:
    """Monitor on an open W&B run. A client error is a warning, told once per kind."""

    def __init__(self, run: wandb.Run, run_dir: Path, logger: logging.Logger):
        self.run: wandb.Run | None = run
        self.run_dir, self.logger = run_dir, logger
        self.told: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of history."""
        self._send(step, dict(values))

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture, copied into the W&B folder."""
        import wandb

        with self._tolerant("image"):
            self._send(step, {name: wandb.Image(str(path))})

    def decision(self, decision: Mapping[str, Any]) -> None:
        """Score table, vote table, heat map of all checks so far, one series per block, and an alert."""
        import wandb

        if self.run is None:
            return
        with self._tolerant("decision"):
            now = decision_of(decision)
            earlier = decisions_of(read_json_lines(self.run_dir / "decisions.jsonl").rows)[0]
            checks = [d for d in earlier if d.check < now.check] + [now]
            values: dict[str, Any] = {"prune/decision": tables.sentence(now)}
            for block, score in now.scores.get(now.scored_by, {}).items():
                values[f"score/{now.scored_by}/block_{block:02d}"] = score.value
            picture = plots.score_heat_map(checks, now.scored_by)
            if picture is not None:
                values["score/heat_map"] = wandb.Image(_open_picture(picture))
            self._send(now.step, values)
            for name, table in (("score/table", tables.score_table(now)), ("prune/vote", tables.vote_table(now))):
                if table.rows:
                    rows = [list(row) for row in table.rows]
                    self._send(now.step, {name: wandb.Table(columns=list(table.columns), data=rows)})
            self.run.alert(title=f"Pruning check {now.check}: depth {now.depth}"[:63], text=tables.sentence(now))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures, nested names joined with "/"."""
        with self._tolerant("summary"):
            if self.run is not None:
                self.run.summary.update(dict(_flat(values, "")))

    def artifact(self, folder: Path, name: str, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """Log a folder as an artifact with its lineage; its files are referred to where they lie, not copied."""
        import wandb

        with self._tolerant("artifact"):
            if self.run is not None:
                for used in used_artifacts(facts or {}) if not self.run.offline else ():
                    self.run.use_artifact(used)
                artifact = wandb.Artifact(artifact_name(name), type=kind, metadata=dict(facts or {}))
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable")
                self.run.log_artifact(artifact)

    def finish(self, exit_code: int = 0, hurry: bool = False) -> None:
        """Close the run; waits at most UPLOAD_SECONDS for uploads. For a hurry see sender.py."""
        with self._tolerant("finish"):
            run, self.run = self.run, None
            if run is not None:
                run.finish(exit_code=exit_code)

    def _send(self, step: int, values: dict[str, Any]) -> None:
        with self._tolerant("log"):
            if self.run is not None:
                self.run.log({"step": step, **values})

    @contextmanager
    def _tolerant(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # telemetry must not end a training run, whatever it raises
            kind = f"{action}: {type(error).__name__}"
            if kind not in self.told:
                self.told.add(kind)
                self.logger.warning("Weights & Biases %s failed (%s); training goes on.", action, _one_line(error))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _open_picture(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
