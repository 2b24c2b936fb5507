"""The table at the end of a run: which suite has passed on which storage.

A pytest plugin, loaded by the conftest of the project's folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from celery_triggers.testing.media import Medium
from tests import media

#: The last is what a storage alone has to show: its locks, plans, fail-overs, admin.
SUITES = ('conformance', 'races', 'model', 'transactions', 'its own')
_PROPERTY = 'storage by suite'


def cell_of(item: pytest.Item) -> tuple[str, str] | None:
    """Return the medium and the suite that a test belongs to, if it is one of these."""
    callspec = getattr(item, 'callspec', None)
    medium = _medium_of(callspec.params) if callspec else ''
    return (medium, _suite_of(item.path)) if medium else None


def _medium_of(params: Mapping[str, Any]) -> str:
    found = [value.name for value in params.values() if isinstance(value, Medium)]
    # The tests of Django's storage go by the alias of a database.
    return found[0] if found else f'django-{params["alias"]}' if 'alias' in params else ''


def _suite_of(path: Path) -> str:
    if path.name == 'test_races.py':
        return 'races'
    if path.name == 'test_transactions.py':
        return 'transactions'
    for suite in ('conformance', 'model', 'transactions'):
        if suite in path.parts:
            return suite
    return SUITES[-1]


class Table:
    """What has come of the tests of each medium and suite."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[tuple[str, str], str]] = {}

    def note(self, report: pytest.TestReport) -> None:
        """Count a report; a test that fails while it is set up or torn down has failed."""
        cell = dict(report.user_properties).get(_PROPERTY)
        if cell is None or (report.outcome == 'passed' and report.when != 'call'):
            return
        _, known = self.outcomes.get(report.nodeid, (cell, ''))
        if known != 'failed':
            self.outcomes[report.nodeid] = (tuple(cell), report.outcome)

    def rows(self, names: Iterable[str]) -> list[list[str]]:
        """Return the cells, a row for each medium that something was counted of."""
        counted = Counter(self.outcomes.values())
        return [
            [name, *(self._text(counted, (name, suite)) for suite in SUITES)]
            for name in names
            if any(medium == name for medium, _ in (cell for cell, _ in counted))
        ]

    @staticmethod
    def _text(counted: Counter[Any], cell: tuple[str, str]) -> str:
        parts = [str(counted[cell, 'passed'])] if counted[cell, 'passed'] else []
        parts += [f'{counted[cell, o]} {o}' for o in ('failed', 'skipped') if counted[cell, o]]
        return ', '.join(parts) or '-'


_table = Table()


def pytest_itemcollected(item: pytest.Item) -> None:
    cell = cell_of(item)
    if cell:
        item.user_properties.append((_PROPERTY, cell))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _table.note(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = _table.rows([medium.name for medium in media.MEDIA])
    if not rows:
        return
    terminalreporter.section('storage by suite, tests passed')
    rows.insert(0, ['', *SUITES])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line('  '.join(cells).rstrip())
    for name, what in media.missing().items():
        terminalreporter.write_line(f'{name} was not run: {what}')
