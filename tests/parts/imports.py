"""What imports what in the package: every import, those for type checkers and late ones too."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ['PACKAGE', 'circles', 'imports_of', 'room_of', 'rooms']

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'celery_triggers'


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the modules of a package by their full names."""
    found = {}
    for path in sorted(package.rglob('*.py')):
        parts = [package.name, *path.relative_to(package).with_suffix('').parts]
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def imports_of(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return which modules of a package each of its modules imports.

    An import of names that are modules counts for these, and not for their folder.
    """
    known = modules(package)
    return {
        name: {found for found in _imported(ast.parse(path.read_text()), known) if found != name}
        for name, path in known.items()
    }


def _imported(tree: ast.Module, known: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = {f'{node.module}.{alias.name}' for alias in node.names}
            below = whole.intersection(known)
            found |= below
            if below != whole:
                found.add(node.module)
    return found.intersection(known)


def room_of(module: str) -> str:
    """Return the folder, or the module at the top, that a module of the package is in."""
    return module.split('.')[1] if '.' in module else ''


def rooms(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return which rooms each room imports; the package's own ``__init__`` is left out."""
    found: dict[str, set[str]] = {}
    for module, imported in imports_of(package).items():
        room = room_of(module)
        if room:
            others = {room_of(other) for other in imported}
            found.setdefault(room, set()).update(others - {room, ''})
    return found


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the groups of names that lead to each other, the largest first (Tarjan's)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in edges.get(name, ()):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name):]
            del stack[stack.index(name):]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return sorted(found, key=len, reverse=True)
