"""Configurations in YAML."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from celery_triggers.exceptions import InvalidConfiguration, MissingExtra
from celery_triggers.loading.document import Document, Lines, Path

__all__ = ['read_yaml']

#: What a key may be: a string, or the sign that the members of another mapping come here.
_KEYS = ('tag:yaml.org,2002:str', 'tag:yaml.org,2002:merge')


def read_yaml(text: str) -> Document:
    """Read a YAML text of plain values.

    Raises:
        InvalidConfiguration: It is none, a mapping has a key twice or one that is no
            string, or a value contains itself.
        MissingExtra: The extra is not installed.
    """
    yaml = _library()
    lines = Lines()
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, lines)
        lines[()] = _line(root)
        _note(lines, (), root, ())
        return Document(loader.construct_document(root), lines)
    except yaml.YAMLError as exc:
        raise _refusal(exc, text) from exc


def _refusal(error: Any, text: str) -> InvalidConfiguration:
    if hasattr(error, 'problem_mark'):
        said = ', '.join(filter(None, (error.context, error.problem)))
        said += f' (column {error.problem_mark.column + 1})'
        line = error.problem_mark.line + 1
    else:
        # A character that YAML does not allow.
        said, line = error.reason, text.count('\n', 0, error.position) + 1
    return InvalidConfiguration(f'it cannot be read as YAML: {said}', line=line)


def _library() -> Any:
    try:
        return import_module('yaml')
    except ImportError as exc:
        raise MissingExtra('a configuration in YAML', 'yaml') from exc


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _note(lines: Lines, path: Path, node: Any, around: tuple[Any, ...]) -> None:
    """Keep the lines of all that stands in a node, and refuse what JSON cannot say."""
    if node in around:
        raise InvalidConfiguration('a value must not contain itself', line=_line(node))
    around = (*around, node)
    if node.id == 'mapping':
        for key, member in node.value:
            if key.tag not in _KEYS:
                raise _no_string(key)
            way = (*path, key.value)
            lines.add_key(way, _line(key))
            _note(lines, way, member, around)
    elif node.id == 'sequence':
        for number, member in enumerate(node.value):
            way = (*path, number)
            lines[way] = _line(member)
            _note(lines, way, member, around)


def _no_string(key: Any) -> InvalidConfiguration:
    mend = f"write '{key.value}' in quotes" if key.id == 'scalar' else f'not a {key.id}'
    return InvalidConfiguration(f'a key must be a string: {mend}', line=_line(key))
