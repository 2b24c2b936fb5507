"""Configurations in files: in JSON, TOML or YAML, with errors that name file and line.

May import the engine and ``exceptions``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery_triggers.engine.configuration import Configuration
from celery_triggers.exceptions import InvalidConfiguration
from celery_triggers.loading.document import Document
from celery_triggers.loading.in_json import read_json
from celery_triggers.loading.in_toml import read_toml
from celery_triggers.loading.in_yaml import read_yaml

__all__ = ['configuration_in', 'load_configuration']

_READERS = {'.json': read_json, '.toml': read_toml, '.yaml': read_yaml, '.yml': read_yaml}


def load_configuration(path: str | os.PathLike[str]) -> Configuration:
    """Return the configuration that a file holds.

    Args:
        path: Its suffix tells its format: ``.json``, ``.toml``, ``.yaml`` or ``.yml``.

    Raises:
        InvalidConfiguration: The file cannot be read, or its content is refused; the error
            names the file and, where that is known, the line.
        MissingExtra: The extra of its format is not installed.
    """
    with configuration_in(path) as content:
        return Configuration.parse(content)


@contextmanager
def configuration_in(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give what a file holds, and put file and line into what is said against it.

    Raises:
        InvalidConfiguration: As by :func:`load_configuration`, or from within the block.
        MissingExtra: The extra of its format is not installed.
    """
    document = None
    try:
        document = _read(Path(path))
        yield document.configuration
    except InvalidConfiguration as exc:
        exc.file = os.fspath(path)
        if document is not None and exc.line is None:
            exc.line = document.line_of(exc)
        raise
    except RecursionError as exc:
        raise InvalidConfiguration(
            'its values are nested too deeply to be read', file=os.fspath(path)
        ) from exc


def _read(path: Path) -> Document:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ', '.join(_READERS)
        raise InvalidConfiguration(
            f'the suffix of a configuration file tells its format: {known}; not {path.suffix!r}'
        )
    text = _text_of(path)
    try:
        return reader(text)
    except InvalidConfiguration:
        raise
    except ValueError as exc:
        # Such as a number with too many digits, or a 30th of February.
        raise InvalidConfiguration(f'it cannot be read: {exc}') from exc


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode('utf-8-sig')
    except OSError as exc:
        raise InvalidConfiguration(f'it cannot be read: {exc.strerror}') from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b'\n', 0, exc.start) + 1
        raise InvalidConfiguration(
            f'it is not in UTF-8: {exc.reason}; save it in UTF-8', line=line
        ) from exc
