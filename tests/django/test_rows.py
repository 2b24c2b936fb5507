"""Many rows in one commit, which are not written one by one."""

from __future__ import annotations

from typing import Any

import pytest

from celery_triggers.storages.records import Request
from celery_triggers.testing.conformance.test_contract import apply, commit, content, row
from celery_triggers.testing.media import Medium

#: More than one statement lists in any database.
NUMBER = 2000


@pytest.fixture
def backend(medium: Medium) -> Any:
    backend = medium.backend()
    apply(backend, rows={f't_a#{number}': row() for number in range(NUMBER)})
    return backend


def everything(backend: Any) -> Any:
    return content(backend._read(Request(whole=True)))


def test_all_are_written(backend: Any):
    changed = {f't_a#{number}': row(2, 'scheduled', eta=number) for number in range(NUMBER)}
    apply(backend, 'v1', 'v2', rows=changed)
    assert everything(backend)[3] == changed


@pytest.mark.parametrize('other', [row(1, 'scheduled'), row(3, 'scheduled'), row(9)])
@pytest.mark.parametrize('number', [0, 1500])
def test_one_of_another_revision_lets_all_be_refused(backend: Any, other: Any, number: int):
    before = everything(backend)
    changed = {f't_a#{n}': row(2, 'scheduled') for n in range(NUMBER)}
    changed[f't_a#{number}'] = other
    fresh = backend._commit(commit('v1', 'v2', rows=changed), Request())
    assert fresh is not None
    assert fresh.version == 'v1'
    assert everything(backend) == before


def test_one_that_is_missing_lets_all_be_refused(backend: Any):
    before = everything(backend)
    changed = {f't_a#{n}': row(2) for n in range(NUMBER + 1)}
    assert backend._commit(commit('v1', 'v2', rows=changed), Request()) is not None
    assert everything(backend) == before
