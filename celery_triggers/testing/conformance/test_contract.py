"""What a medium promises to the floors above it: ``_read``, ``_commit``, ``_write``, ..."""

from __future__ import annotations

import time
from typing import Any

import pytest

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import TriggersError
from celery_triggers.storages.base import StorageBackend
from celery_triggers.storages.records import Commit, Request, Row, Slice, StorageTime, Write
from celery_triggers.testing.conformance.support import delivery, statuses
from celery_triggers.testing.media import Medium

WHOLE = Request(whole=True)
HEAD = '{"format":2}'


def row(rev: int = 1, status: str = 'unstarted', body: str = '{"kwargs":{}}', **values: Any) -> Row:
    texts = {'status': status, 'token': '', 'loss': '', 'task_id': '', 'body': body}
    return Row(**{**dict.fromkeys(Row._fields, 0), **texts, 'rev': rev, **values})


def commit(expected: str = '', version: str = 'v1', **parts: Any) -> Commit:
    values: dict[str, Any] = {
        'incarnation': 'i1',
        'head': HEAD,
        'puts': {},
        'drops': [],
        'rows': {},
        'waits_added': [],
        'waits_removed': [],
        **parts,
    }
    return Commit(expected, version, **values)


def apply(backend: StorageBackend, expected: str = '', version: str = 'v1', **parts: Any) -> None:
    assert backend._commit(commit(expected, version, **parts), Request()) is None


def content(found: Slice | None) -> tuple[Any, ...]:
    """Return a slice's content but its time, in no order."""
    assert found is not None
    waiting = {trigger: sorted(names) for trigger, names in found.waiting.items()}
    return found.version, found.head, found.entries, found.rows, waiting


def everything(backend: StorageBackend) -> tuple[Any, ...]:
    return content(backend._read(WHOLE))


@pytest.fixture
def backend(medium: Medium) -> StorageBackend:
    return medium.backend()


@pytest.fixture
def filled(backend: StorageBackend) -> StorageBackend:
    apply(
        backend,
        puts={'t:t_a': '3,2,2', 'l:a': '1:{}', 'l:b': '2:{"x":1}', 'e:one': '{}', 'h:1': '[]'},
        rows={'t_a#0': row(), 't_a#1': row(body='{"kwargs":{"a":{}}}'), 't_b#0': row()},
        waits_added=[('a', 't_a#0'), ('b', 't_a#0'), ('b', 't_a#1'), ('c', 't_b#0')],
    )
    return backend


# ------------------------------------------------------------------------- reading


def test_a_session_that_does_not_exist_is_an_empty_slice(backend: StorageBackend):
    assert everything(backend) == ('', '', {}, {}, {})
    part = Request(entries=['t:x'], names=['t_a#0'], triggers=['a'], passing='p')
    assert content(backend._read(part)) == ('', '', {}, {}, {})


def test_a_whole_slice_holds_everything(filled: StorageBackend):
    version, head, entries, rows, waiting = everything(filled)
    assert (version, head) == ('v1', HEAD)
    assert entries == {
        't:t_a': '3,2,2', 'l:a': '1:{}', 'l:b': '2:{"x":1}', 'e:one': '{}', 'h:1': '[]'
    }
    assert set(rows) == {'t_a#0', 't_a#1', 't_b#0'}
    assert rows['t_a#1'] == row(body='{"kwargs":{"a":{}}}')
    assert waiting == {'a': ['t_a#0'], 'b': ['t_a#0', 't_a#1'], 'c': ['t_b#0']}


def test_a_slice_of_nothing_holds_the_head_alone(filled: StorageBackend):
    assert content(filled._read(Request())) == ('v1', HEAD, {}, {}, {})


def test_a_slice_holds_exactly_the_entries_that_were_asked_for(filled: StorageBackend):
    found = filled._read(Request(entries=['l:b', 'l:missing', 'e:one']))
    assert content(found) == ('v1', HEAD, {'l:b': '2:{"x":1}', 'e:one': '{}'}, {}, {})


def test_a_slice_holds_exactly_the_rows_that_were_asked_for(filled: StorageBackend):
    found = filled._read(Request(names=['t_a#1', 't_a#7']))
    assert content(found)[2:] == ({}, {'t_a#1': row(body='{"kwargs":{"a":{}}}')}, {})


def test_a_slice_holds_who_waits_for_the_triggers_with_their_rows(filled: StorageBackend):
    found = filled._read(Request(triggers=['b', 'nobody']))
    assert content(found)[4] == {'b': ['t_a#0', 't_a#1']}
    assert set(found.rows) == {'t_a#0', 't_a#1'}
    assert found.entries == {}


def test_a_row_that_is_asked_for_in_two_ways_is_there_once(filled: StorageBackend):
    found = filled._read(Request(names=['t_a#0', 't_b#0'], triggers=['a', 'b']))
    assert content(found)[4] == {'a': ['t_a#0'], 'b': ['t_a#0', 't_a#1']}
    assert set(found.rows) == {'t_a#0', 't_a#1', 't_b#0'}


def test_sessions_do_not_see_each_other(medium: Medium, filled: StorageBackend):
    other = medium.backend('order:2')
    assert everything(other)[0] == ''
    apply(other, version='w1', puts={'l:a': 'other'})
    assert filled._read(Request(entries=['l:a'])).entries == {'l:a': '1:{}'}
    assert other._read(Request(entries=['l:a'])).entries == {'l:a': 'other'}


def test_prefixes_do_not_see_each_other(medium: Medium, filled: StorageBackend):
    application = medium.application(triggers_key_prefix=f'{medium.prefix}_other')
    assert everything(medium.backend(application=application))[0] == ''


def test_time_is_the_storages_and_never_goes_back(backend: StorageBackend):
    times = [backend._read(Request()).now for _ in range(20)]
    assert times == sorted(times)
    assert times[0] > 1_600_000_000_000


# ----------------------------------------------------------------------- committing


def test_a_commit_changes_what_it_says(filled: StorageBackend):
    apply(
        filled,
        'v1',
        'v2',
        head='{"format":2,"firings":1}',
        puts={'l:a': '9:{}', 'l:new': '1:{}'},
        drops=['h:1', 'h:missing'],
        rows={'t_a#0': row(2, 'scheduled'), 't_c#0': row()},
        waits_added=[('z', 't_c#0')],
        waits_removed=[('a', 't_a#0'), ('b', 't_a#0'), ('never', 't_a#0')],
    )
    version, head, entries, rows, waiting = everything(filled)
    assert (version, head) == ('v2', '{"format":2,"firings":1}')
    assert entries == {
        't:t_a': '3,2,2', 'l:a': '9:{}', 'l:b': '2:{"x":1}', 'l:new': '1:{}', 'e:one': '{}'
    }
    assert rows['t_a#0'] == row(2, 'scheduled')
    assert set(rows) == {'t_a#0', 't_a#1', 't_b#0', 't_c#0'}
    assert waiting == {'b': ['t_a#1'], 'c': ['t_b#0'], 'z': ['t_c#0']}


PARTS: dict[str, Any] = {
    'puts': {'l:a': 'changed', 'l:new': 'new'},
    'drops': ['e:one'],
    'rows': {'t_a#0': row(2, 'scheduled'), 't_new#0': row()},
    'waits_added': [('a', 't_new#0')],
    'waits_removed': [('b', 't_a#0')],
    'passing': ('made-up', '{}', 60),
    'configuration': ('digest', '{}'),
}


@pytest.mark.parametrize('expected', ['', 'v0', 'v11', 'V1', 'v'])
def test_a_commit_on_another_version_answers_a_fresh_slice_and_changes_nothing(
    filled: StorageBackend, expected: str
):
    before = everything(filled)
    fresh = filled._commit(
        commit(expected, 'v2', **PARTS), Request(entries=['l:a', 'l:new'], triggers=['a'])
    )
    assert content(fresh) == (
        'v1', HEAD, {'l:a': '1:{}'}, {'t_a#0': row()}, {'a': ['t_a#0']}
    )
    assert everything(filled) == before
    assert filled._configuration('digest') is None
    assert filled._read(Request(passing='made-up')).entries == {}


def test_a_commit_on_a_session_that_is_gone_changes_nothing(backend: StorageBackend):
    fresh = backend._commit(commit('v1', 'v2', **PARTS), WHOLE)
    assert content(fresh) == ('', '', {}, {}, {})
    assert everything(backend) == ('', '', {}, {}, {})


@pytest.mark.parametrize('rev', [1, 3, 9])
def test_a_commit_over_another_revision_of_a_row_is_refused_whole(
    filled: StorageBackend, rev: int
):
    before = everything(filled)
    parts = {**PARTS, 'rows': {'t_a#1': row(2), 't_a#0': row(rev), 't_new#0': row()}}
    fresh = filled._commit(commit('v1', 'v2', **parts), WHOLE)
    assert content(fresh) == before
    assert everything(filled) == before
    assert filled._configuration('digest') is None


def test_a_commit_over_a_row_that_is_missing_is_refused_whole(filled: StorageBackend):
    before = everything(filled)
    parts = {**PARTS, 'rows': {'t_new#0': row(2)}}
    assert content(filled._commit(commit('v1', 'v2', **parts), WHOLE)) == before
    assert everything(filled) == before


def test_a_conditional_write_in_between_is_noticed(filled: StorageBackend):
    found = filled._read(Request(names=['t_a#0']))
    assert filled._write(Write('t_a#0', 'i1', [{}], {'status': 'running'}))[0]
    fresh = filled._commit(
        commit(found.version, 'v2', rows={'t_a#0': row(2, 'abandoned')}), Request(names=['t_a#0'])
    )
    assert fresh is not None
    assert fresh.version == found.version, 'a conditional write leaves the version alone'
    assert fresh.rows['t_a#0'] == row(2, 'running')


def test_two_commits_on_one_version_only_the_first_is_applied(medium: Medium):
    one, two = medium.backend(), medium.backend()
    assert one._commit(commit('', 'v1', puts={'l:a': 'one'}), WHOLE) is None
    fresh = two._commit(commit('', 'v2', puts={'l:a': 'two'}), WHOLE)
    assert content(fresh) == ('v1', HEAD, {'l:a': 'one'}, {}, {})


def test_a_repeated_commit_answers_with_its_own_version(filled: StorageBackend):
    change = commit('v1', 'v2', **PARTS)
    assert filled._commit(change, Request()) is None
    before = everything(filled)
    fresh = filled._commit(change, Request())
    assert fresh is not None
    assert fresh.version == 'v2'
    assert everything(filled) == before


def test_a_passing_event_is_found_with_any_request(filled: StorageBackend):
    apply(filled, 'v1', 'v2', passing=('made-up', '{"x":1}', 60))
    for request in (Request(passing='made-up'), Request(whole=True, passing='made-up')):
        assert filled._read(request).entries['p:made-up'] == '{"x":1}'
    for request in (Request(), Request(passing='other'), Request(passing='MADE-UP')):
        assert 'p:made-up' not in filled._read(request).entries
    fresh = filled._commit(commit('v1', 'v3'), Request(passing='made-up'))
    assert fresh is not None
    assert fresh.entries == {'p:made-up': '{"x":1}'}


def test_a_passing_event_is_not_kept_for_ever(backend: StorageBackend):
    start = backend._read(Request()).now
    apply(backend, passing=('short', '{}', 1))
    while backend._read(Request(passing='short')).entries:
        assert backend._read(Request()).now < start + 5000
        time.sleep(0.02)
    assert backend._read(Request()).now >= start + 900


def test_many_names_in_one_slice(backend: StorageBackend):
    """More than a query may list at once."""
    names = [f't_a#{number}' for number in range(1200)]
    apply(
        backend,
        puts={f'l:{number}': str(number) for number in range(1200)},
        rows={name: row() for name in names},
        waits_added=[(f'w{number % 7}', name) for number, name in enumerate(names)],
    )
    found = backend._read(
        Request(entries=[f'l:{number}' for number in range(1100)], names=names[:1100])
    )
    assert len(found.entries) == 1100
    assert set(found.rows) == set(names[:1100])
    found = backend._read(Request(triggers=['w3']))
    assert set(found.waiting['w3']) == set(found.rows) == set(names[3::7])


# --------------------------------------------------------------- conditional writes


def test_a_write_needs_one_of_its_guards_whole(filled: StorageBackend):
    guards = [
        {'status': 'unstarted', 'attempt': 1},
        {'status': 'unstarted', 'attempt': 0, 'token': ''},
    ]
    applied, found = filled._write(Write('t_a#0', 'i1', guards, {'status': 'running', 'sends': 3}))
    assert applied
    assert found == row(2, 'running', sends=3)
    assert filled._read(Request(names=['t_a#0'])).rows['t_a#0'] == found


@pytest.mark.parametrize(
    'guards',
    [
        [],
        [{'status': 'running'}],
        [{'status': 'unstarted', 'token': 'x'}],
        [{'attempt': 1}, {'rev': 2}, {'task_id': 'x'}, {'eta': 1}],
    ],
)
def test_a_write_without_a_matching_guard_answers_the_row_and_changes_nothing(
    filled: StorageBackend, guards: list[dict[str, Any]]
):
    before = everything(filled)
    assert filled._write(Write('t_a#0', 'i1', guards, {'status': 'running'})) == (False, row())
    assert everything(filled) == before


@pytest.mark.parametrize(('name', 'incarnation'), [('t_a#0', 'i2'), ('t_a#9', 'i1'), ('x', 'i1')])
def test_a_write_to_another_incarnation_or_an_unknown_instance_does_nothing(
    filled: StorageBackend, name: str, incarnation: str
):
    before = everything(filled)
    assert filled._write(Write(name, incarnation, [{}], {'status': 'running'})) == (False, None)
    assert everything(filled) == before


def test_a_write_to_a_session_that_does_not_exist_does_nothing(backend: StorageBackend):
    assert backend._write(Write('t_a#0', '', [{}], {'status': 'running'})) == (False, None)
    assert everything(backend) == ('', '', {}, {}, {})


def test_a_write_can_set_the_storages_time(filled: StorageBackend):
    before = filled._read(Request()).now
    changes = {'lease': StorageTime(60_000), 'changed': StorageTime(), 'eta': StorageTime(-5)}
    applied, found = filled._write(Write('t_a#0', 'i1', [{}], changes))
    after = filled._read(Request()).now
    assert applied
    assert found is not None
    assert before <= found.changed <= after
    assert found.lease == found.changed + 60_000
    assert found.eta == found.changed - 5


NASTY = ['a|b', 'a%b', '%7C', 'a+b', '+5', 'line\nline', 'a\x00b', '', '☃ 🎉', "q'uo\"te", '\\']


@pytest.mark.parametrize('text', NASTY)
def test_columns_hold_any_text(filled: StorageBackend, text: str):
    apply(filled, 'v1', 'v2', rows={'t_a#0': row(2, token=text, task_id=text)})
    assert filled._read(Request(names=['t_a#0'])).rows['t_a#0'] == row(2, token=text, task_id=text)
    guards = [{'token': text, 'task_id': text}]
    applied, found = filled._write(
        Write('t_a#0', 'i1', guards, {'token': text + text, 'status': 'running'})
    )
    assert applied
    assert found == row(3, 'running', token=text + text, task_id=text)
    assert filled._read(Request(names=['t_a#0'])).rows['t_a#0'] == found


@pytest.mark.parametrize('body', ['', 'a\nb\n', 'a|b%|\n+', '\x00', '🎉', 'x' * 200_000])
def test_bodies_and_entries_hold_any_text(backend: StorageBackend, body: str):
    apply(backend, puts={'l:a': body}, rows={'t_a#0': row(body=body)})
    found = backend._read(WHOLE)
    assert found.entries == {'l:a': body}
    assert found.rows == {'t_a#0': row(body=body)}


def test_large_numbers_are_kept_exactly(filled: StorageBackend):
    moment = 253_402_300_799_999
    changes = {'lease': moment, 'eta': moment, 'attempt': 2**31 - 1}
    _, found = filled._write(Write('t_a#0', 'i1', [{}], changes))
    assert found == row(2, lease=moment, eta=moment, attempt=2**31 - 1)
    assert filled._write(Write('t_a#0', 'i1', [{'lease': moment}], {'lease': 0}))[0]


# ------------------------------------------------------------- deleting, configurations


def test_a_deleted_session_leaves_nothing(medium: Medium, filled: StorageBackend):
    apply(filled, 'v1', 'v2', configuration=('d', '{}'))
    other = medium.backend('order:2')
    apply(other)
    assert filled._delete() is True
    assert everything(filled) == ('', '', {}, {}, {})
    assert medium.uids() == ['order:2']
    assert filled._delete() is False
    assert everything(other)[0] == 'v1'
    assert filled._configuration('d') == '{}', 'configurations are shared by sessions'


def test_what_was_read_or_claimed_before_a_deletion_matches_nothing_after_it(medium: Medium):
    manager = medium.manager({'t_a': {'after': ['a'], 'run': 'x'}})
    manager.fire('a')
    stale = manager.storage.read(Plan(whole=True))
    late = delivery(manager, 't_a#0')
    assert manager.storage.delete()
    manager.fire('a', {'again': True})
    assert manager.storage.load().head.incarnation != stale.session.head.incarnation
    assert not late.claim()
    assert not late.finish({})
    assert statuses(manager) == {'t_a#0': 'scheduled'}
    assert delivery(manager, 't_a#0').claim()


def test_a_configuration_is_stored_once_by_content(backend: StorageBackend):
    apply(backend, configuration=('d', '{"t_a":1}'))
    apply(backend, 'v1', 'v2', configuration=('d', '{"t_a":2}'))
    assert backend._configuration('d') == '{"t_a":1}'
    assert backend._configuration('other') is None


def test_a_configuration_that_was_lost_is_an_error(backend: StorageBackend):
    with pytest.raises(TriggersError, match='lost data'):
        backend.configuration('0' * 32)


def test_a_configuration_is_read_back(medium: Medium):
    configuration = {
        't_a': {'after': ['a', {'any': ['b', {'all': ['c', 'd']}]}], 'unless': ['e'], 'run': 'x'},
        't_b': {'after': [{'atLeast': 2, 'of': ['a', 'b', 'c']}], 'andEvery': 'd', 'run': 'y'},
    }
    manager = medium.manager(configuration)
    manager.start()
    parsed = Configuration.parse(configuration)
    text = manager.storage._configuration(parsed.digest)
    assert text is not None
    assert Configuration.from_text(text) == parsed
    assert manager.storage.configuration(parsed.digest) == parsed


# -------------------------------------------------------------------------------- uids

UIDS = [
    'order:1', 'order:10', 'order:2', 'ORDER:1', 'order', 'order*', 'order?x', 'order[1]',
    'order\\1', 'order_1', 'order%1', 'order^', 'order-1', ' order', 'order ', 'käse', 'kASE',
    'a}:s:order:1', '{order}', 'x}:w:order:1', '☃', 'o\nrder', 'o\x00rder',
]


PREFIXES = [
    '', 'order', 'order:', 'order:1', 'o*', '*', '?', 'order?', 'order[', 'order[1]', '[o]',
    'order\\', 'order_', 'order%', 'order^', 'order-', ' ', 'ORDER', 'kä', 'a}', '{', 'o\n',
    'o\x00', '☃', 'nobody', '}:s:', 's:', 'o[^x]', 'order[0-9]', ']', '[]',
]


def test_uids_are_found_by_a_literal_prefix(medium: Medium):
    application = medium.application()
    for uid in UIDS:
        # Something waits, so that a session has each kind of key.
        apply(
            medium.backend(uid, application),
            rows={'t_a#0': row()},
            waits_added=[('a', 't_a#0')],
            passing=('p', '{}', 600),
            configuration=('d', '{}'),
        )
    for prefix in PREFIXES:
        found = sorted(medium.uids(prefix))
        assert found == sorted(uid for uid in UIDS if uid.startswith(prefix)), prefix


def test_many_uids_are_found_once_each(medium: Medium):
    application = medium.application()
    uids = [f'order:{number}' for number in range(150)]
    for uid in uids:
        apply(medium.backend(uid, application))
    assert sorted(medium.uids('order:')) == sorted(uids)


# -------------------------------------------------------------------------- the format


def test_what_is_stored_carries_its_format(medium: Medium):
    manager = medium.manager({'t_a': {'after': ['a'], 'run': 'x'}})
    manager.fire('a')
    assert '"format":2' in manager.storage._read(Request()).head


def test_a_newer_format_is_refused_and_left_alone(medium: Medium):
    manager = medium.manager({'t_a': {'after': ['a'], 'run': 'x'}})
    manager.fire('b')
    version = manager.storage._read(Request()).version
    apply(manager.storage, version, 'v2', head='{"format":3,"something":"else"}')
    before = everything(manager.storage)
    for action in (
        lambda: manager.fire('a'),
        lambda: manager.cancel(),
        lambda: manager.storage.instances,
        lambda: manager.update_configuration({'t_b': {'after': ['b'], 'run': 'x'}}),
    ):
        with pytest.raises(TriggersError, match='newer version'):
            action()
    assert everything(manager.storage) == before
