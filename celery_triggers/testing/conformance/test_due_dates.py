"""The index of due dates: set with commits and writes, taken by sweeps, each once."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import Due, Request, StorageTime, Taken, Write
from celery_triggers.testing.conformance.test_contract import apply, commit, row
from celery_triggers.testing.media import Medium

HOUR = 3_600_000
#: Milliseconds; nobody looks at a medium in a test for longer unless it means to.
GAP = 250


def take(medium: Medium, limit: int = 1000, push: int = 1000, gap: int = HOUR) -> Taken:
    return medium.storage_class.take_due(
        medium.url, medium.application().settings, limit=limit, push=push, gap=gap
    )


def dates(medium: Medium) -> dict[tuple[str, str], int]:
    class_ = medium.storage_class
    found = class_.due_dates(medium.url, medium.application().settings)
    return {(uid, name): at for uid, name, at in found}


@pytest.fixture
def backend(medium: Medium) -> StorageBackend:
    return medium.backend('order:1')


def now(backend: StorageBackend) -> int:
    return backend._read(Request()).now


def test_a_commit_sets_moves_and_removes_due_dates(medium: Medium, backend: StorageBackend):
    apply(backend, rows={'t_a#0': row()}, dues={'t_a#0': 5, 't_b#0': 7, '': 9})
    assert dates(medium) == {('order:1', 't_a#0'): 5, ('order:1', 't_b#0'): 7, ('order:1', ''): 9}
    apply(backend, 'v1', 'v2', dues={'t_a#0': 6, 't_b#0': 0})
    assert dates(medium) == {('order:1', 't_a#0'): 6, ('order:1', ''): 9}


def test_a_refused_commit_sets_no_due_date(medium: Medium, backend: StorageBackend):
    apply(backend)
    assert backend._commit(commit('other', 'v2', dues={'t_a#0': 5}), Request()) is not None
    assert dates(medium) == {}


def test_a_write_sets_a_due_date_only_if_it_is_applied(medium: Medium, backend: StorageBackend):
    apply(backend, rows={'t_a#0': row()}, dues={'t_a#0': 5})
    refused = Write('t_a#0', 'i1', [{'attempt': 9}], {}, due=8)
    assert not backend._write(refused)[0]
    assert dates(medium) == {('order:1', 't_a#0'): 5}
    before = now(backend)
    backend._write(Write('t_a#0', 'i1', [{}], {'lease': StorageTime(50)}, due=StorageTime(50)))
    at = dates(medium)[('order:1', 't_a#0')]
    assert before + 50 <= at <= now(backend) + 50
    assert backend._read(Request(names=['t_a#0'])).rows['t_a#0'].lease == at
    backend._write(Write('t_a#0', 'i1', [{}], {}))
    assert dates(medium) == {('order:1', 't_a#0'): at}
    backend._write(Write('t_a#0', 'i1', [{}], {}, due=0))
    assert dates(medium) == {}


def test_a_write_to_no_row_removes_a_date_that_is_left_over(
    medium: Medium, backend: StorageBackend
):
    apply(backend, dues={'t_a#0': 5, '': 6})
    assert backend._write(Write('t_a#0', 'i1', [{}], {})) == (False, None)
    assert len(dates(medium)) == 2
    assert backend._write(Write('t_a#0', 'other', [{}], {}, due=0)) == (False, None)
    assert backend._write(Write('', '', [], {}, due=0)) == (False, None)
    assert dates(medium) == {}


def test_a_date_of_another_incarnation_stays(medium: Medium, backend: StorageBackend):
    apply(backend, rows={'t_a#0': row()}, dues={'t_a#0': 5})
    assert backend._write(Write('t_a#0', 'old', [{}], {}, due=0)) == (False, None)
    assert dates(medium) == {('order:1', 't_a#0'): 5}


def test_a_guard_may_ask_for_a_time_that_has_come(backend: StorageBackend):
    later = now(backend) + HOUR
    apply(backend, rows={'t_a#0': row(), 't_b#0': row(eta=later)})
    guards = [{'status': 'unstarted', 'eta': StorageTime()}]
    assert backend._write(Write('t_a#0', 'i1', guards, {'attempt': 1}))[0]
    assert not backend._write(Write('t_b#0', 'i1', guards, {'attempt': 1}))[0]
    beyond = [{'eta': StorageTime(2 * HOUR)}]
    assert backend._write(Write('t_b#0', 'i1', beyond, {'attempt': 1}))[0]


def test_taking_moves_what_is_due_and_leaves_the_rest(medium: Medium, backend: StorageBackend):
    later = now(backend) + HOUR
    apply(backend, dues={'t_a#0': 5, 't_b#0': later})
    before = now(backend)
    taken = take(medium, push=60_000)
    assert taken.entries == [Due('order:1', 't_a#0', 5, False)]
    assert before <= taken.now <= now(backend)
    moved = dates(medium).pop(('order:1', 't_a#0'))
    assert before + 60_000 <= moved <= taken.now + 60_000
    assert dates(medium)['order:1', 't_b#0'] == later
    assert taken.next_at == moved
    assert take(medium).entries == []


def test_what_was_taken_comes_again_when_its_new_date_has_come(
    medium: Medium, backend: StorageBackend
):
    apply(backend, dues={'t_a#0': 5})
    assert take(medium, push=1).entries
    while not (again := take(medium, push=HOUR).entries):
        time.sleep(0.001)
    assert again[0][:2] == ('order:1', 't_a#0')


def test_a_pass_takes_a_bounded_number_and_says_that_there_is_more(
    medium: Medium, backend: StorageBackend
):
    apply(backend, dues={f't_a#{number}': 5 for number in range(150)})
    taken = take(medium, limit=64, push=HOUR)
    assert 0 < len(taken.entries) <= 64
    assert taken.more
    found = {due.name for due in taken.entries}
    while taken.more:
        taken = take(medium, limit=64, push=HOUR)
        names = {due.name for due in taken.entries}
        assert not names & found
        found |= names
    assert len(found) == 150


def test_the_earliest_are_taken_first(medium: Medium, backend: StorageBackend):
    apply(backend, dues={'t_late#0': 9, 't_early#0': 3})
    assert take(medium, limit=1).entries[0].name == 't_early#0'


def test_nothing_is_calm_after_a_gap_and_calm_comes_back(medium: Medium, backend: StorageBackend):
    apply(backend, dues={'t_a#0': 5})
    began = now(backend)
    calm = take(medium, push=1, gap=GAP).entries[0].calm
    assert not calm  # nobody had ever looked
    while not calm:
        time.sleep(0.005)
        for due in take(medium, push=1, gap=GAP).entries:
            calm = due.calm
    ended = now(backend)
    assert ended - began >= GAP
    while now(backend) <= ended + GAP:
        time.sleep(0.005)
    entries = take(medium, push=1, gap=GAP).entries
    assert [due.calm for due in entries] == [False]


@pytest.mark.parametrize('uid', ['order:1', '3:abc', ':', '12', 'a b\n', '🎉', 'x' * 500])
def test_owners_and_names_of_any_kind_are_told_apart(medium: Medium, uid: str):
    apply(medium.backend(uid), dues={'t:a#0': 5, '': 5, '1:x#12': 5})
    apply(medium.backend(uid + '1'), dues={'t:a#0': 5})
    expected = {(uid, 't:a#0'), (uid, ''), (uid, '1:x#12'), (uid + '1', 't:a#0')}
    assert set(dates(medium)) == expected
    assert {due[:2] for due in take(medium).entries} == expected


def test_deleting_a_session_removes_its_due_dates(medium: Medium, backend: StorageBackend):
    other = medium.backend('order:2')
    apply(other, dues={'t_a#0': 5})
    apply(backend, rows={'t_a#0': row()}, dues={'t_a#0': 5, '': 6})
    assert backend.delete()
    assert dates(medium) == {('order:2', 't_a#0'): 5}


def test_a_session_is_deleted_only_at_the_version_that_is_meant(
    medium: Medium, backend: StorageBackend
):
    apply(backend, dues={'': 6})
    assert not backend.delete('v0')
    assert backend.exists
    assert dates(medium)
    assert backend.delete('v1')
    assert not backend.exists
    assert not backend.delete('v1')
    assert dates(medium) == {}


def test_many_sweepers_share_what_is_due(medium: Medium):
    for number in range(20):
        apply(medium.backend(f's:{number}'), dues={f't_a#{i}': 5 for i in range(10)})
    found: list[tuple[str, str]] = []
    errors: list[BaseException] = []

    def sweep() -> None:
        try:
            while True:
                taken = take(medium, limit=64, push=HOUR)
                found.extend((due.uid, due.name) for due in taken.entries)
                if not taken.more and not taken.entries:
                    return
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == len(set(found)) == 200


def test_write_many_answers_each_write(medium: Medium):
    backends = [medium.backend(f's:{number}') for number in range(3)]
    for backend in backends[:2]:
        apply(backend, rows={'t_a#0': row()})
    write: Any = Write('t_a#0', 'i1', [{'attempt': 0}], {'attempt': 1}, due=7)
    answers = type(backends[0]).write_many([(backend, write) for backend in backends])
    assert answers == [(True, row(2, attempt=1)), (True, row(2, attempt=1)), (False, None)]
    again = type(backends[0]).write_many([(backends[0], write)])
    assert again == [(False, row(2, attempt=1))]
    assert dates(medium) == {('s:0', 't_a#0'): 7, ('s:1', 't_a#0'): 7}
    assert type(backends[0]).write_many([]) == []
