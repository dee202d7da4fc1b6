"""Write docs/API.md: the public functions and classes of every module, one line each, from their docstrings.

    python tools/make_api_docs.py            writes it
    python tools/make_api_docs.py --check    exits with 1 where it is not up to date

The source is read, not imported. Public is what has a docstring and no underscore in front. Commands (cli/) are left
out: `--help` describes them.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entprune_ds"
OUT = ROOT / "docs" / "API.md"
HEAD = """\
# API

Public functions and classes of every module, by folder. Made from the docstrings by `python tools/make_api_docs.py`; a
test keeps it up to date. Settings are described by `entprune-ds COMMAND --help`, the commands by `entprune-ds --help`.
"""


def main(words: list[str]) -> int:
    """Write or check the file; returns the exit status."""
    text = document()
    if "--check" not in words:
        OUT.write_text(text)
        return 0
    if OUT.is_file() and OUT.read_text() == text:
        return 0
    print(f"{OUT.relative_to(ROOT)} is not up to date. Run python tools/make_api_docs.py", file=sys.stderr)
    return 1


def document() -> str:
    """The whole file."""
    parts, folder = [HEAD], None
    files = sorted(PACKAGE.rglob("*.py"), key=lambda p: (len(p.relative_to(PACKAGE).parts), p))
    for path in files:
        place = path.relative_to(PACKAGE)
        lines = None if place.parts[0] == "cli" else module_lines(path)
        if not lines:
            continue
        if place.parent != folder:
            folder = place.parent
            parts.append(f"\n## {'entprune_ds' if folder == Path() else f'entprune_ds/{folder}'}\n")
        parts += lines
    return "\n".join(parts) + "\n"


def module_lines(path: Path) -> list[str]:
    """A module and what it offers; nothing where it offers nothing."""
    tree = ast.parse(path.read_text())
    offered = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    listed = [f"- `{signature(node)}`: {first_line(node)}" for node in offered if first_line(node)]
    if not listed:
        return []
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return [f"**`{name}`** {first_line(tree)}\n", *listed, ""]


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Name and arguments of a function; the name of a class."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    names += [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    names += [arg.arg for arg in a.kwonlyargs] + ([f"**{a.kwarg.arg}"] if a.kwarg else [])
    return f"{node.name}({', '.join(names)})"


def first_line(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    """The first sentence of a docstring on one line."""
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`])[.;:] ", text)[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
