"""A session that cannot be read or saved holds up no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_triggers.exceptions import StorageUnavailable, TriggersError
from celery_triggers.storages.document import index as document_index
from celery_triggers.testing.conformance.test_contract import apply
from celery_triggers.testing.media import Medium
from tests.documents.shelf import Shelf
from tests.documents.test_costs import sweep

UIDS = ('s:1', 's:2', 's:3')


@pytest.fixture
def due(shelf: Shelf, shelf_medium: Medium) -> Medium:
    shelf.at = 1000
    for uid in UIDS:
        apply(shelf_medium.backend(uid), dues={'t_a#0': 5})
    return shelf_medium


def taken(medium: Medium) -> list[str]:
    return sorted(due.uid for due in sweep(medium).entries)


def test_a_session_that_cannot_be_read_comes_again(shelf: Shelf, due: Medium):
    good = shelf.documents['triggers:s:s:2']
    shelf.documents['triggers:s:s:2'] = '[99]'
    with pytest.raises(TriggersError, match='upgrade'):
        _ = due.backend('s:2').exists
    assert taken(due) == ['s:1', 's:3']
    assert taken(due) == []
    shelf.documents['triggers:s:s:2'] = good
    assert taken(due) == []
    shelf.at = 1000 + 30_000
    assert taken(due) == ['s:1', 's:2', 's:3']


def test_a_session_that_cannot_be_saved_comes_again(shelf: Shelf, due: Medium):
    def around(do: Callable[[], Any]) -> Any:
        if shelf.calls[-1] == ('save', 'triggers:s:s:2'):
            raise StorageUnavailable('it is too large')
        return do()

    shelf.around = around
    assert taken(due) == ['s:1', 's:3']
    assert taken(due) == []
    shelf.around = lambda do: do()
    shelf.at = 1000 + 30_000
    assert 's:2' in taken(due)


def test_a_medium_that_is_down_ends_the_sweep(shelf: Shelf, due: Medium):
    def around(do: Callable[[], Any]) -> Any:
        if shelf.calls[-1][0] == 'save':
            raise StorageUnavailable('it is down')
        return do()

    shelf.around = around
    shelf.calls.clear()
    with pytest.raises(StorageUnavailable):
        sweep(due)
    assert len(shelf.calls) < 25, 'it is not asked for each session'


def test_what_others_change_all_the_time_is_given_up(
    shelf: Shelf, due: Medium, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(document_index.time, 'sleep', lambda _: None)
    name = 'triggers:s:s:2'

    def around(do: Callable[[], Any]) -> Any:
        if shelf.calls[-1] == ('save', name):
            shelf.documents[name] += ' '
        return do()

    shelf.around = around
    backend: Any = due.backend('s:2')
    with pytest.raises(StorageUnavailable, match='all the time'):
        backend._delete()
    assert taken(due) == ['s:1', 's:3']
    shelf.around = lambda do: do()
    assert backend._delete()
