"""The table of storages by suites counts what has happened, each test once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.summary import Table


def report(nodeid: str, when: Any, outcome: Any, cell: Any = ('redis', 'races')) -> Any:
    properties = [('storage by suite', cell)] if cell else []
    return pytest.TestReport(
        nodeid, (nodeid, 1, nodeid), {}, outcome, None, when, user_properties=properties
    )


def table(*reports: Any) -> list[list[str]]:
    found = Table()
    for one in reports:
        found.note(one)
    return [row[:4] for row in found.rows(['memory', 'redis'])]


def test_a_test_that_passes_is_counted_once():
    steps = [report('t', when, 'passed') for when in ('setup', 'call', 'teardown')]
    assert table(*steps) == [['redis', '-', '1', '-']]


@pytest.mark.parametrize('when', ['setup', 'call', 'teardown'])
def test_one_that_fails_anywhere_has_failed(when: str):
    steps = [
        report('t', step, 'failed' if step == when else 'passed')
        for step in ('setup', 'call', 'teardown')
        if not (when == 'setup' and step == 'call')
    ]
    assert table(*steps) == [['redis', '-', '1 failed', '-']]


def test_each_outcome_stands_in_its_cell():
    assert table(
        report('a', 'call', 'passed'), report('b', 'call', 'failed'),
        report('c', 'setup', 'skipped'), report('d', 'call', 'passed', ('memory', 'model')),
        report('e', 'call', 'passed', None),
    ) == [['memory', '-', '-', '1'], ['redis', '-', '1, 1 failed, 1 skipped', '-']]
