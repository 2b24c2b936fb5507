"""What each operation loads and saves. ``s`` is a session, ``d`` the index of due dates."""

from __future__ import annotations

from typing import Any

import pytest

from celery_triggers.registry import storage_backends
from celery_triggers.storages.records import Taken
from celery_triggers.testing.conformance.support import delivery
from celery_triggers.testing.media import Medium
from tests.documents.shelf import Shelf

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_next': {'after': ['t_join'], 'run': 'x'},
}

CHANGE = ['load s', 'save s']
DUE = ['load d', 'save d']


def sweep(medium: Medium) -> Taken:
    settings = medium.application().settings
    kind = storage_backends.get_class(medium.key)
    taken: Taken = kind.take_due(medium.url, settings, limit=100, push=30_000, gap=30_000)
    return taken


def test_a_firing_that_moves_no_due_date_is_one_load_and_one_save(
    shelf: Shelf, shelf_medium: Medium
):
    manager = shelf_medium.manager(TASKS)
    manager.fire('a')
    shelf.kinds()
    manager.fire('nothing')
    assert shelf.kinds() == CHANGE
    manager.fire('a', event_id='e')
    assert shelf.kinds() == CHANGE
    assert manager.fire('a', event_id='e').duplicate
    assert shelf.kinds() == ['load s']


def test_the_index_is_written_when_something_falls_due_first(shelf: Shelf, shelf_medium: Medium):
    manager = shelf_medium.manager(TASKS)
    manager.fire('a')
    shelf.kinds()
    manager.fire('b')
    assert shelf.kinds() == ['load s', *DUE, 'save s']
    run = delivery(manager, 't_join#0')
    shelf.kinds()
    assert run.claim()
    assert shelf.kinds() == CHANGE, 'the lease ends later than the message was due'
    assert run.finish(None)
    assert shelf.kinds() == CHANGE, 'what it releases is due later too'


def test_a_session_begins_with_a_place_in_the_index(shelf: Shelf, shelf_medium: Medium):
    shelf_medium.manager(TASKS, 'order:0').fire('a')
    shelf.kinds()
    shelf_medium.manager(TASKS, 'order:1').fire('a')
    assert shelf.kinds() == [
        'load s', 'save s', 'load s',  # an empty document
        'load c',
        'load u', 'save u',
        'save s',
    ]


def test_a_sweep_that_finds_nothing_due_writes_nothing(shelf: Shelf, shelf_medium: Medium):
    manager = shelf_medium.manager(TASKS)
    manager.fire('a')
    manager.fire('b')
    sweep(shelf_medium)
    shelf.kinds()
    taken = sweep(shelf_medium)
    assert taken.next_at is not None
    assert shelf.kinds() == ['load z', *['load d'] * 16]


def test_a_sweep_puts_an_outdated_entry_right_once(shelf: Shelf, shelf_medium: Medium):
    manager = shelf_medium.manager(TASKS, triggers_dispatch_grace=0.1)
    manager.fire('a')
    manager.fire('b')
    run = delivery(manager, 't_join#0')
    run.claim()
    lease = manager.storage['t_join#0'].record.lease
    sweep(shelf_medium)
    shelf.at = lease - 1
    shelf.kinds()
    assert sweep(shelf_medium).entries == []
    assert [kind for kind in shelf.kinds() if kind.startswith('save')] == [
        'save z', 'save s', 'save d'
    ]
    assert sweep(shelf_medium).next_at == lease
    shelf.at = lease
    assert [due.name for due in sweep(shelf_medium).entries] == ['t_join#0']


@pytest.mark.parametrize('method', ['put_due', 'put'])
def test_the_index_looks_after_itself(shelf: Shelf, shelf_medium: Medium, method: str):
    """Sessions that are gone, as after the death of a process, do not stay in it."""
    application = shelf_medium.application(TASKS)
    index = shelf_medium.backend('x', application)._index  # type: ignore[attr-defined]
    for number in range(300):
        if method == 'put':
            index.put([index.uid(f'gone:{number}'), index.gate(f'task-{number}', f'gone:{number}')])
        else:
            index.put_due(f'gone:{number}', 1)
    kept = sum(len(entries) for entries in index.read(index.uid_shards))
    if method == 'put':
        assert kept <= 2 * 64
    else:
        assert sweep(shelf_medium).more
        while sweep(shelf_medium).more:
            pass
        assert index.read(index.due_shards) == [{}] * 16
