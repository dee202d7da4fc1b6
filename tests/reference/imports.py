"""The import graph of the package, read from its sources without running them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "entprune_ds"


@cache
def sources() -> dict[str, Path]:
    """{dotted module name relative to the package ("" is the package itself): its file}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """Syntax tree of a module."""
    return ast.parse(sources()[module].read_text())


def imported_names(module: str) -> list[str]:
    """Everything that a module imports anywhere in it, as absolute dotted names."""
    names = []
    path = ["entprune_ds", *module.split(".")] if module else ["entprune_ds"]
    package = path if sources()[module].name == "__init__.py" else path[:-1]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


@cache
def inside(module: str) -> tuple[str, ...]:
    """Modules of the package that a module imports (`from a import b` means a.b where that is a module)."""
    found = set()
    for name in imported_names(module):
        if name.split(".")[0] == "entprune_ds":
            target = name.removeprefix("entprune_ds").removeprefix(".")
            while target not in sources():
                target = target.rpartition(".")[0]
            found.add(target)
    return tuple(sorted(found - {module}))


@cache
def outside(module: str) -> frozenset[str]:
    """Top-level names of what a module imports from outside the package, standard library included."""
    return frozenset(name.split(".")[0] for name in imported_names(module)) - {"entprune_ds"}


def cycle(graph: dict[str, tuple[str, ...]]) -> list[str]:
    """Some cycle of a graph, first node repeated at the end; empty when there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in graph[node]:
            if found := search(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := search(node, []))), [])
