"""What the commands share: help made from the config's own docstrings, and errors on one line each."""

from __future__ import annotations

import ast
import atexit
import contextlib
import dataclasses
import inspect
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from entprune_ds import config_data, config_methods, config_prune, config_sampling, config_schema
from entprune_ds.config import METHODS, PRESETS, Config, ConfigError, load_config
from entprune_ds.redact import redacted

GRAMMAR = """\
Settings are `key=value` words, after an optional `preset=NAME` (or preset=FILE.yaml). Later words win.
Presets: {presets}.
"""


def wants_help(words: list[str]) -> bool:
    """Whether --help or -h is among the words."""
    return bool({"-h", "--help"} & set(words))


def leave(status: int) -> NoReturn:
    """End this process now that its work is done, exit handlers included, but without the interpreter's finalisation.

    DeepSpeed keeps references to process groups that are destroyed, so their threads outlive them; now and then one
    aborts a rank in finalisation ("terminate called without an active exception"), and the job with it.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):  # whoever read has left
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def launched_words(argv: list[str] | None) -> tuple[list[str], bool]:
    """The words of a command that a launcher starts on every rank, and whether --dry-run was among them."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept = [w for w in words if w != "--dry-run" and not w.startswith("--local_rank=")]  # older launchers add it
    return kept, "--dry-run" in words


def help_text(head: str, sections: list[str]) -> str:
    """Command help: its own text, the grammar, and every setting of the named sections with its default."""
    presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    lines = [head.rstrip(), "", GRAMMAR.format(presets=presets)]
    documents, hints = _field_docs(), {f.name: f for f in dataclasses.fields(Config)}
    for section in sections:
        cls = type(getattr(Config(), section))
        lines.append(f"{section}: {documents['Config'][hints[section].name]}")
        for item in dataclasses.fields(cls):
            default = getattr(cls(), item.name)
            shown = "null" if default is None else list(default) if isinstance(default, tuple) else default
            lines.append(f"  {section}.{item.name}={shown}")
            lines.append(f"      {documents[cls.__name__][item.name]}")
        if section == "prune":
            lines += ["", "  What prune.method stands for; it wins over a preset, and other words over it:"]
            lines += [f"  {name}: {_settings_of(values)}" for name, values in METHODS.items()]
        lines.append("")
    return "\n".join(lines)


def _settings_of(values: dict[str, dict[str, Any]]) -> str:
    """Nested settings as words."""
    words = [f"{s}.{key}={'null' if v is None else v}" for s, part in values.items() for key, v in part.items()]
    return " ".join(word.replace(", ", ",") for word in words)


def _field_docs() -> dict[str, dict[str, str]]:
    """{class: {field: the docstring under it}} of the settings."""
    modules = (config_schema, config_data, config_methods, config_prune, config_sampling)
    trees, docs = [ast.parse(inspect.getsource(m)) for m in modules], {}
    for cls in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        docs[cls.name] = {
            field.target.id: str(text.value.value)
            for field, text in zip(cls.body, cls.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }  # fmt: skip
    return docs


REFUSAL_SECONDS = 5.0
"""Time that a refusing node gives its first rank to say why."""


def refuse(problems: list[str]) -> int:
    """Print every problem on its own line, once per node of a launched job; returns the exit status 2.

    The other ranks of the node wait a little: a launcher ends all as soon as one leaves, also the one that speaks.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in problems:
            print(f"error: {redacted(one_line(problem))}", file=sys.stderr, flush=True)
    else:
        time.sleep(REFUSAL_SECONDS)
    return 2


def one_line(text: str) -> str:
    """A text on one line, with letters that a terminal would act on, such as those of a file name, written out."""
    words = " ".join(line.strip() for line in text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def split_shortcuts(words: list[str], shortcuts: dict[str, str]) -> list[str]:
    """Replace short keys by full ones, e.g. {"out": "sample.out"}."""
    full = []
    for word in words:
        key, equals, value = word.partition("=")
        full.append(f"{shortcuts[key]}={value}" if equals and key in shortcuts else word)
    return full


def model_settings(words: list[str]) -> dict[str, Any]:
    """The stated `model.*` settings, converted to their types; their combination is not checked.

    Raises:
        ConfigError: listing unknown settings and values of another type.
    """
    model = load_config(words, check=lambda config: []).model
    names = {word.partition("=")[0].removeprefix("model.") for word in words}
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name in names}


def with_run(words: list[str], command: str) -> tuple[list[str], Path | None]:
    """Expand `run=FOLDER` into the settings of that run: its config.yaml first, then its exported model.

    Returns:
        The expanded words, and the run folder or None.

    Raises:
        ConfigError: when the folder is not a run, or `preset=` is given as well.
    """
    runs = [w.removeprefix("run=") for w in words if w.startswith("run=")]
    rest = [w for w in words if not w.startswith("run=")]
    if not runs:
        return rest, None
    folder = Path(runs[-1])
    problems = []
    if not (folder / "config.yaml").is_file():
        problems.append(
            f"`run`: {folder} is not a run folder (config.yaml is missing). Give RUNS/NAME of a training run."
        )
    if any(w.startswith("preset=") for w in rest):
        problems.append(f"`{command}` takes either run=FOLDER or preset=NAME, not both.")
    if problems:
        raise ConfigError(problems)
    own = [f"preset={folder / 'config.yaml'}", f"model.weights={folder / 'model'}"]
    if re.search(r"^  criterion: .*\.py['\"]?$", (folder / "config.yaml").read_text(errors="replace"), re.M):
        own.append(f"prune.criterion={Config().prune.criterion}")  # the run's own file is no concern of this command
    return [*own, *rest], folder
