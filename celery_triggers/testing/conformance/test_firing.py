"""What a manager does over each storage: firings, event ids, history, names, payloads."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from kombu.exceptions import ContentDisallowed

from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import (
    EventConflict,
    InvalidConfiguration,
    InvalidFiring,
    InvalidTransition,
    StorageUnavailable,
    TriggersError,
    UnknownInstance,
)
from celery_triggers.manager import TriggerManager
from celery_triggers.storages.records import Request
from celery_triggers.sweep import Sweep
from celery_triggers.testing.conformance.support import (
    application_of,
    before_commit,
    delivery,
    fired,
    lose_answer,
    repeat_commit,
    statuses,
)
from celery_triggers.testing.media import Medium

JOIN = {'t_join': {'after': ['a', 'b'], 'run': 'x'}}
EACH = {'t_each': {'after': ['never'], 'andEvery': 'a', 'run': 'x'}}
PAIR = {'t_one': {'after': ['a'], 'run': 'x'}, 't_two': {'after': ['t_one'], 'run': 'x'}}


def snapshot(manager: TriggerManager) -> tuple[Any, ...]:
    """Return everything that a session holds."""
    session = manager.storage.load()
    return (
        session.head, session.configuration, session.latest, session.counts, session.instances,
        session.waiting, session.history,
        {event: record for event, record in session.events.items() if record.lasting},
    )


# ------------------------------------------------------------------------- the basics


def test_a_join_is_released_once_with_the_kwargs_of_each_trigger(medium: Medium):
    manager = medium.manager(JOIN)
    assert manager.fire('a', {'x': 1}).created == ['t_join#0']
    assert statuses(manager) == {'t_join#0': 'unstarted'}
    assert manager.fire('b', {'y': [1, {'z': None}]}).released == ['t_join#0']
    assert manager.fire('b', {'y': 2}).released == []
    assert manager.storage['t_join#0'].kwargs == {'a': {'x': 1}, 'b': {'y': [1, {'z': None}]}}
    assert manager.storage.latest_kwargs == {'a': {'x': 1}, 'b': {'y': 2}}
    assert application_of(manager).released == ['t_join#0']


def test_another_process_sees_what_one_did(medium: Medium):
    one, two = medium.manager(JOIN), medium.manager(JOIN)
    one.fire('a')
    assert two.fire('b').released == ['t_join#0']
    assert statuses(one) == {'t_join#0': 'scheduled'}


def test_an_outcome_and_its_cascade_are_one_change(medium: Medium):
    manager = medium.manager(PAIR)
    manager.fire('a')
    run = delivery(manager, 't_one#0')
    assert run.claim()
    assert statuses(manager) == {'t_one#0': 'running'}
    assert run.finish({'n': 1})
    assert statuses(manager) == {'t_one#0': 'finished', 't_two#0': 'scheduled'}
    assert manager.storage['t_two#0'].kwargs == {'t_one': {'n': 1}}
    assert not run.fail('too late', {})
    assert statuses(manager) == {'t_one#0': 'finished', 't_two#0': 'scheduled'}


def test_a_claim_is_exclusive_and_repeating_ones_own_is_harmless(medium: Medium):
    manager = medium.manager(PAIR)
    manager.fire('a')
    mine, other = delivery(manager, 't_one#0', 'mine'), delivery(manager, 't_one#0', 'other')
    assert mine.claim()
    assert mine.claim()
    assert not other.claim()
    assert not other.fail('not mine', {})
    record = manager.storage['t_one#0'].record
    assert record.token == 'mine'
    assert record.lease - record.claimed == 60_000
    assert mine.fail('mine', {'type': 'E', 'message': 'm'})


@pytest.mark.parametrize('loss', ['fail', 'again'])
def test_a_claim_is_of_one_process(medium: Medium, loss: str):
    """Celery may give a request, with its token, to a second child of the same worker."""
    manager = medium.manager(PAIR)
    manager.fire('a')
    dead, second = delivery(manager, 't_one#0', 'token'), delivery(manager, 't_one#0', 'token')
    dead.loss = second.loss = loss
    second.process = dead.process + 1
    assert dead.claim()
    assert not second.claim()
    # Nobody waits for the lease of a process that is gone.
    record = manager.storage['t_one#0'].record
    assert record.token == 'token'
    assert record.lease <= manager.storage.read(Plan()).now
    Sweep(application_of(manager), medium.storage_class, medium.url).run()
    assert statuses(manager)['t_one#0'] == ('scheduled' if loss == 'again' else 'failed')


def test_a_claim_made_while_an_outcome_is_decided_is_not_lost(medium: Medium):
    manager = medium.manager(PAIR)
    manager.fire('a')
    mine = delivery(manager, 't_one#0', 'mine')
    before_commit(manager.storage, lambda: delivery(medium.manager(PAIR), 't_one#0', 'x').claim())
    # It had not been claimed when this was decided; when it is committed it has been.
    assert not mine.fail('of nobody', {})
    assert statuses(manager) == {'t_one#0': 'running'}


def test_a_change_that_meets_another_is_decided_again(medium: Medium):
    manager = medium.manager(JOIN)
    before_commit(manager.storage, lambda: medium.manager(JOIN).fire('a', {'first': True}))
    firing = manager.fire('b', {'second': True})
    assert firing.released == ['t_join#0']
    assert firing.created == []
    assert fired(manager) == ['a', 'b']


def test_a_session_that_another_made_in_between_is_joined(medium: Medium):
    manager = medium.manager(EACH)
    for number in range(3):
        before_commit(manager.storage, lambda: medium.manager(EACH).fire('a', {'n': 'other'}))
        manager.fire('a', {'n': number})
    assert sorted(statuses(manager)) == [f't_each#{number}' for number in range(6)]


def test_a_session_keeps_the_configuration_and_the_manager_that_it_began_with(medium: Medium):
    medium.manager(JOIN, finalizing=True).fire('a')
    later = medium.manager(EACH)
    assert later.fire('a').heard_by == ['t_join']
    assert set(later.storage.tasks) == {'t_join'}
    assert later.storage.load().head.manager == 'finalizing'


def test_update_configuration_is_for_one_session(medium: Medium):
    manager = medium.manager(JOIN)
    manager.update_configuration({'t_more': {'after': ['c'], 'run': 'x'}})
    assert set(manager.storage.tasks) == {'t_join', 't_more'}
    other = medium.manager(JOIN, 'order:2')
    other.start()
    assert set(other.storage.tasks) == {'t_join'}


def test_timestamps_never_go_back(medium: Medium):
    manager = medium.manager(PAIR)
    times = [manager.fire('a').at for _ in range(10)]
    assert times == sorted(times)
    assert all(time.tzinfo is timezone.utc for time in times)


# -------------------------------------------------------------------------- the history


@pytest.mark.parametrize('limit', [0, 1, 3, 10, 1000])
def test_the_history_keeps_so_many_of_the_latest_firings(medium: Medium, limit: int):
    manager = medium.manager(EACH, triggers_history_limit=limit)
    for number in range(7):
        manager.fire('a', {'n': number})
        manager.fire('b')
    history = manager.storage.history
    assert [record.number for record in history] == list(range(15 - min(limit, 14), 15))
    assert [record.trigger for record in history] == (['a', 'b'] * 7)[max(0, 14 - limit) :]
    assert manager.storage.latest_kwargs == {'a': {'n': 6}, 'b': {}}
    assert manager.storage.load().head.firings == 14


def test_a_step_that_fires_more_than_the_history_holds(medium: Medium):
    tasks = {f't_{n}': {'after': ['a', 'never'], 'unless': ['stop'], 'run': 'x'} for n in range(6)}
    manager = medium.manager(tasks, triggers_history_limit=4)
    manager.fire('a')
    manager.fire('stop')
    assert fired(manager) == [f't_{n}:abandoned' for n in range(2, 6)]


def test_a_record_of_the_history_says_what_happened(medium: Medium):
    manager = medium.manager(PAIR)
    manager.fire('a', {'x': 1}, event_id='e')
    delivery(manager, 't_one#0').finish('done')
    one, two = manager.storage.history
    assert (one.trigger, one.kwargs, one.event_id, one.cause) == ('a', {'x': 1}, 'e', None)
    assert one.heard_by == ['t_one']
    assert (two.trigger, two.kwargs, two.cause) == ('t_one', {'result': 'done'}, 't_one#0')


# ---------------------------------------------------------------------------- event ids


def test_an_event_id_is_applied_once_and_a_repeat_answers_what_the_first_did(medium: Medium):
    manager = medium.manager(JOIN)
    manager.fire('a')
    first = manager.fire('b', {'x': [1, 2]}, event_id='e')
    before = snapshot(manager)
    again = medium.manager(JOIN).fire('b', {'x': (1, 2)}, event_id='e')
    assert not first.duplicate
    assert again.duplicate
    assert snapshot(manager) == before
    fields = ('event_id', 'at', 'heard_by', 'created', 'released', 'abandoned', 'trigger')
    assert [getattr(again, f) for f in fields] == [getattr(first, f) for f in fields]
    assert application_of(manager).released == ['t_join#0']


def test_an_event_id_lasts_longer_than_the_history(medium: Medium):
    manager = medium.manager(EACH, triggers_history_limit=1)
    manager.fire('a', event_id='e')
    for _ in range(5):
        manager.fire('b')
    assert manager.fire('a', event_id='e').duplicate
    assert list(statuses(manager)) == ['t_each#0']


@pytest.mark.parametrize(('trigger', 'kwargs'), [('b', {'x': 1}), ('a', {'x': 2}), ('a', {})])
def test_an_event_id_with_other_content_is_a_conflict(
    medium: Medium, trigger: str, kwargs: dict[str, Any]
):
    manager = medium.manager(EACH)
    manager.fire('a', {'x': 1}, event_id='e')
    before = snapshot(manager)
    with pytest.raises(EventConflict) as caught:
        manager.fire(trigger, kwargs, event_id='e')
    assert (caught.value.event_id, caught.value.trigger) == ('e', trigger)
    assert snapshot(manager) == before


def test_event_ids_are_of_one_session_and_end_with_it(medium: Medium):
    manager, other = medium.manager(EACH), medium.manager(EACH, 'order:2')
    manager.fire('a', event_id='e')
    assert not other.fire('a', event_id='e').duplicate
    manager.storage.delete()
    assert not manager.fire('a', event_id='e').duplicate


def test_firings_without_an_event_id_are_all_applied(medium: Medium):
    manager = medium.manager(EACH)
    ids = {manager.fire('a').event_id for _ in range(5)}
    assert len(ids) == len(statuses(manager)) == 5


@pytest.mark.parametrize('event_id', ['', 3, b'e', '\ud800'])
def test_a_bad_event_id_is_refused(medium: Medium, event_id: Any):
    manager = medium.manager(EACH)
    with pytest.raises(InvalidFiring):
        manager.fire('a', event_id=event_id)
    assert not manager.storage.exists


# -------------------------------------------------------------- answers that are lost


@pytest.mark.parametrize('event_id', [None, 'e'])
def test_a_commit_that_the_client_repeats_is_applied_once(medium: Medium, event_id: str | None):
    manager = medium.manager(EACH)
    for trigger in ('b', 'a'):
        repeat_commit(manager.storage)
        firing = manager.fire(trigger, event_id=event_id and event_id + trigger)
        assert not firing.duplicate
    assert statuses(manager) == {'t_each#0': 'unstarted'}
    assert fired(manager) == ['b', 'a']


@pytest.mark.parametrize('event_id', [None, 'e'])
@pytest.mark.parametrize('known', [True, False])
def test_a_commit_that_is_repeated_after_anothers_is_applied_once(
    medium: Medium, event_id: str | None, known: bool
):
    manager, other = medium.manager(EACH), medium.manager(EACH)
    if known:
        manager.start()
    repeat_commit(manager.storage, between=lambda: other.fire('a', {'n': 'other'}))
    firing = manager.fire('a', {'n': 'mine'}, event_id=event_id)
    assert firing.created == ['t_each#0']
    kwargs = [instance.kwargs['a']['n'] for instance in manager.storage]
    assert kwargs == ['mine', 'other']


def test_what_a_repeated_commit_released_is_dispatched_once(medium: Medium):
    manager, other = medium.manager(PAIR), medium.manager(PAIR)
    repeat_commit(manager.storage, between=lambda: other.fire('b'))
    assert manager.fire('a').released == ['t_one#0']
    assert application_of(manager).released == ['t_one#0']
    assert application_of(other).released == []


@pytest.mark.parametrize('event_id', [None, 'e'])
@pytest.mark.parametrize('busy', [True, False])
def test_after_a_lost_answer_the_errors_event_id_repeats_safely(
    medium: Medium, event_id: str | None, busy: bool
):
    manager = medium.manager(EACH)
    lose_answer(manager.storage)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', {'n': 1}, event_id=event_id)
    error = caught.value
    assert error.outcome_unknown
    assert error.event_id
    assert event_id in (None, error.event_id)
    if busy:
        medium.manager(EACH).fire('a', {'n': 2})
    again = manager.fire('a', {'n': 1}, event_id=error.event_id)
    assert again.duplicate
    assert again.created == ['t_each#0']
    assert [i.kwargs['a']['n'] for i in manager.storage] == ([1, 2] if busy else [1])
    assert manager.fire('a', {'n': 1}, event_id=error.event_id).duplicate


@pytest.mark.parametrize('event_id', [None, 'e'])
def test_after_an_error_that_changed_nothing_the_errors_event_id_fires(
    medium: Medium, event_id: str | None
):
    manager = medium.manager(EACH)

    def fail() -> None:
        raise StorageUnavailable('no answer', outcome_unknown=True)

    before_commit(manager.storage, fail)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', {'n': 1}, event_id=event_id)
    assert statuses(manager) == {}
    for repeat in range(3):
        again = manager.fire('a', {'n': 1}, event_id=caught.value.event_id)
        assert again.duplicate == bool(repeat)
    assert list(statuses(manager)) == ['t_each#0']


def test_a_made_up_event_id_that_is_repeated_with_other_content_is_a_conflict(medium: Medium):
    manager = medium.manager(EACH)
    lose_answer(manager.storage)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', {'n': 1})
    with pytest.raises(EventConflict):
        manager.fire('a', {'n': 2}, event_id=caught.value.event_id)


def test_an_outcome_whose_answer_was_lost_counts_once(medium: Medium):
    manager, other = medium.manager(PAIR), medium.manager(PAIR)
    manager.fire('a')
    run = delivery(manager, 't_one#0')
    run.claim()
    repeat_commit(manager.storage, between=lambda: other.fire('b'))
    assert run.finish({'n': 1})
    assert fired(manager) == ['a', 't_one', 'b']
    assert application_of(manager).released == ['t_one#0', 't_two#0']
    lose_answer(manager.storage)
    run = delivery(manager, 't_two#0')
    with pytest.raises(StorageUnavailable):
        run.finish(None)
    assert not run.finish(None)
    assert fired(manager) == ['a', 't_one', 'b', 't_two']


def test_a_replay_whose_answer_was_lost_happens_once(medium: Medium):
    manager, other = medium.manager(PAIR), medium.manager(PAIR)
    manager.fire('a')
    delivery(manager, 't_one#0').fail('raised', {})
    repeat_commit(manager.storage, between=lambda: other.fire('b'))
    assert manager.replay_failed_instance('t_one#0').name == 't_one#1'
    assert statuses(manager) == {'t_one#0': 'replayed', 't_one#1': 'scheduled'}
    assert application_of(manager).released == ['t_one#0', 't_one#1']
    with pytest.raises(InvalidTransition):
        manager.replay_failed_instance('t_one#0')


# -------------------------------------------------------------------------------- names

NAMES = [
    'plain', 'Plain', 'plain ', ' plain', 'plain\n', '{plain}', 'pl{ain', '}', 'pl:ain', 'plain:',
    ':', '::', 'pl#ain', 'plain#0', '#', 'pl|ain', 'pl%ain', '%7C', 'pl+ain', '+', 'pl\x00ain',
    'plain\x00', 'pl\nain', 'pl\\ain', '*', '?', '[a]', "'", '"', '`', '🎉', '🎉🎉', 'é', 'e\u0301',
    'ß', 'ss', 'İ', 'x' * 1000, 'x' * 1001, '{"json": 1}', '1', '01', '0', 'i:plain', 't:plain',
    'v', 'n', 'm', '5:plain:', '1:a:', 'sessionfinalized', '\x7f', '\u2028', '\ufeff', 'a\tb',
]


def test_uids_of_any_characters_never_meet(medium: Medium):
    application = medium.application(EACH)
    for number, uid in enumerate(NAMES):
        medium.manager(application, uid).fire('a', {'n': number})
    assert sorted(medium.uids()) == sorted(NAMES)
    for number, uid in enumerate(NAMES):
        manager = medium.manager(application, uid)
        assert manager.storage['t_each#0'].kwargs == {'a': {'n': number}}
        assert manager.storage.load().head.firings == 1
    for uid in NAMES[::2]:
        assert medium.manager(application, uid).storage.delete()
    assert sorted(medium.uids()) == sorted(NAMES[1::2])


def test_triggers_of_any_characters_never_meet(medium: Medium):
    configuration = {
        f't_{number:03}': {'after': [name, 'go'], 'run': 'x'} for number, name in enumerate(NAMES)
    }
    manager = medium.manager(configuration)
    for number, name in enumerate(NAMES):
        firing = manager.fire(name, {'n': number})
        assert firing.created == [f't_{number:03}#0']
    assert manager.storage.latest_kwargs == {name: {'n': n} for n, name in enumerate(NAMES)}
    assert set(manager.storage.load().waiting) == {'go'}
    released = manager.fire('go').released
    assert released == [f't_{number:03}#0' for number in range(len(NAMES))]
    for number, name in enumerate(NAMES):
        kwargs = manager.storage[f't_{number:03}#0'].kwargs
        assert kwargs == {name: {'n': number}, 'go': {}}


def test_triggers_of_any_characters_find_who_waits_for_them_alone(medium: Medium):
    """Each is waited for by an instance of its own."""
    manager = medium.manager(
        {f't_{number:03}': {'after': ['go', name], 'run': 'x'} for number, name in enumerate(NAMES)}
    )
    manager.fire('go')
    for number, name in enumerate(NAMES):
        assert manager.fire(name).released == [f't_{number:03}#0']


def test_tasks_of_any_characters_never_meet(medium: Medium):
    configuration = {
        name: {'andEvery': 'go', 'after': [f'{number}'], 'run': 'x'}
        for number, name in enumerate(f't_{name}' for name in NAMES)
    }
    manager = medium.manager(configuration)
    assert len(manager.fire('go').created) == len(NAMES)
    manager.fire('go')
    for number, name in enumerate(f't_{name}' for name in NAMES):
        names = [f'{name}#0', f'{name}#1']
        assert manager.fire(f'{number}').released == names
        run = delivery(manager, names[1])
        assert run.claim()
        assert run.finish({'n': number})
    session = manager.storage.load()
    for number, name in enumerate(f't_{name}' for name in NAMES):
        assert session.latest[name].kwargs == {'n': number}
        own = {i.name: str(i.status) for i in session.instances.values() if i.task == name}
        assert own == {f'{name}#0': 'scheduled', f'{name}#1': 'finished'}
    for name in (f't_{name}' for name in NAMES[::10]):
        found = manager.storage.instances_of_task(name)
        assert [instance.name for instance in found] == [f'{name}#0', f'{name}#1']


def test_event_ids_of_any_characters_never_meet(medium: Medium):
    manager = medium.manager(EACH)
    for number, name in enumerate(NAMES):
        assert not manager.fire('a', {'n': number}, event_id=name).duplicate
    for number, name in enumerate(NAMES):
        again = manager.fire('a', {'n': number}, event_id=name)
        assert again.duplicate
        assert again.created == [f't_each#{number}']
    assert len(statuses(manager)) == len(NAMES)


# ------------------------------------------------------------------------------ payloads

MOMENT = datetime(2030, 2, 3, 4, 5, 6, 789000, tzinfo=timezone.utc)

PLAIN: dict[str, Any] = {
    'nothing': None,
    'truth': [True, False],
    'numbers': [0, -1, 2**53, 1.5, -0.25],
    'text': ['', 'é🎉', 'a\nb', 'x|y%z', "'\"\\", '"__type__"'],
    'nested': {'a': [{'b': {'c': [[], {}]}}]},
    '': {'empty key': 1},
    'large': 'x' * 2000,
}

PAYLOADS: dict[str, dict[Any, Any]] = {
    'json': {
        'moment': MOMENT, 'day': date(2030, 2, 3), 'money': Decimal('10.50'), 'nul': 'a\x00b',
        'id': UUID(int=7), 'deep': [{'moment': MOMENT}], 'bytes': b'\x00\xff',
    },
    'yaml': {'moment': MOMENT, 'day': date(2030, 2, 3), 'bytes': b'\x00\xff', 1: {2: 'ints'}},
    'pickle': {
        'moment': MOMENT, 'money': Decimal('10.50'), 'set': {1, 2}, 'tuple': (1, (2,)),
        'bytes': b'\x00\xff', 'delta': timedelta(days=1), 'nul': 'a\x00b', 'lone': '\ud800',
    },
    'msgpack': {'bytes': b'\x00\xff', 'nul': 'a\x00b', 'deep': [[[[1]]]]},
}
SERIALIZERS = list(PAYLOADS)
#: What some need that is not part of this package.
_PACKAGES = {'yaml': 'yaml', 'msgpack': 'msgpack'}


def with_serializer(medium: Medium, serializer: str, uid: str = 'order:1') -> TriggerManager:
    if serializer in _PACKAGES:
        pytest.importorskip(_PACKAGES[serializer])
    return medium.manager(
        JOIN, uid, triggers_serializer=serializer, accept_content=['json', serializer]
    )


@pytest.mark.parametrize('serializer', SERIALIZERS)
def test_every_serializer_round_trips_its_payloads(medium: Medium, serializer: str):
    manager = with_serializer(medium, serializer)
    payload = {**PLAIN, **{str(k): v for k, v in PAYLOADS[serializer].items()}}
    manager.fire('a', payload, event_id='e')
    manager.fire('b')
    assert manager.fire('a', payload, event_id='e').duplicate
    manager = with_serializer(medium, serializer)
    assert manager.storage['t_join#0'].kwargs == {'a': payload, 'b': {}}
    assert manager.storage.latest_kwargs['a'] == payload
    assert manager.storage.history[0].kwargs == payload
    run = delivery(manager, 't_join#0')
    assert run.claim()
    assert run.finish(payload)
    assert manager.storage['t_join#0'].result == payload
    assert manager.storage.latest_kwargs['t_join'] == payload
    assert manager.fire('a', payload, event_id='e').duplicate
    with pytest.raises(EventConflict):
        manager.fire('a', {**payload, 'text': 'other'}, event_id='e')


@pytest.mark.parametrize('serializer', SERIALIZERS)
def test_a_session_survives_a_change_of_the_serializer(medium: Medium, serializer: str):
    with_serializer(medium, serializer).fire('a', {'x': [1]})
    later = medium.manager(JOIN, accept_content=['json', serializer])
    later.fire('b', {'y': 2})
    assert later.storage['t_join#0'].kwargs == {'a': {'x': [1]}, 'b': {'y': 2}}


def test_what_accept_content_does_not_allow_is_not_read(medium: Medium):
    with_serializer(medium, 'pickle').fire('a', {'x': 1})
    with pytest.raises((ContentDisallowed, TriggersError)):
        _ = medium.manager(JOIN).storage.latest_kwargs


class Unserializable:
    def __reduce__(self) -> Any:
        raise TypeError('never')


UNFIT: list[Any] = [
    {'x': Unserializable()}, {'x': [{'y': Unserializable()}]}, {1: 'a key'}, ['no mapping'], 'text',
]


@pytest.mark.parametrize('serializer', SERIALIZERS)
@pytest.mark.parametrize('kwargs', UNFIT, ids=['value', 'deep', 'key', 'list', 'text'])
def test_unserializable_kwargs_are_refused_before_anything_changes(
    medium: Medium, serializer: str, kwargs: Any
):
    manager = with_serializer(medium, serializer)
    with pytest.raises(InvalidFiring):
        manager.fire('a', kwargs)
    assert not manager.storage.exists
    manager.fire('a', {'x': 1})
    before = snapshot(manager)
    with pytest.raises(InvalidFiring):
        manager.fire('b', kwargs, event_id='e')
    assert snapshot(manager) == before
    assert not manager.fire('b', event_id='e').duplicate


def test_kwargs_that_refer_to_themselves_are_refused(medium: Medium):
    endless: dict[str, Any] = {}
    endless['self'] = endless
    manager = medium.manager(JOIN)
    with pytest.raises(InvalidFiring):
        manager.fire('a', endless)
    assert not manager.storage.exists


def test_kwargs_in_the_dress_of_the_serializer_are_refused_or_kept(medium: Medium):
    """JSON marks a datetime by its keys; a payload with the same keys is no accident."""
    manager = medium.manager(JOIN)
    dressed = {'x': {'__type__': 'no such type', '__value__': 1}}
    with pytest.raises(InvalidFiring):
        manager.fire('a', dressed)
    assert not manager.storage.exists


def test_later_changes_of_the_callers_kwargs_do_not_show(medium: Medium):
    manager = medium.manager(JOIN)
    kwargs: dict[str, Any] = {'x': [1]}
    manager.fire('a', kwargs)
    kwargs['x'].append(2)
    assert manager.storage.latest_kwargs == {'a': {'x': [1]}}
    manager.storage.latest_kwargs['a']['x'].append(3)
    assert manager.storage.latest_kwargs == {'a': {'x': [1]}}


def test_results_of_any_shape_become_kwargs(medium: Medium):
    for number, (result, kwargs) in enumerate(
        [(None, {}), ({'a': 1}, {'a': 1}), ([1], {'result': [1]}), ('x', {'result': 'x'})]
    ):
        manager = medium.manager(PAIR, f'order:{number}')
        manager.fire('a')
        delivery(manager, 't_one#0').finish(result)
        assert manager.storage['t_two#0'].kwargs == {'t_one': kwargs}
        assert manager.storage['t_one#0'].result == result


def test_a_result_that_cannot_be_serialized_fails_the_instance(medium: Medium):
    manager = medium.manager(PAIR)
    manager.fire('a')
    assert delivery(manager, 't_one#0').finish({'x': Unserializable()})
    assert statuses(manager) == {'t_one#0': 'failed'}


# ---------------------------------------------------------------- made by hand

MADE: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'unless': ['never'], 'run': 'x'},
    't_each': {'after': ['b'], 'andEvery': 'a', 'run': 'x'},
}


def test_an_instance_made_by_hand_receives_the_latest_firings_and_is_judged(medium: Medium):
    manager = medium.manager(MADE)
    manager.fire('a', {'n': 1})
    manager.fire('b', {'n': 2})
    made = manager.storage.create_instance('t_join')
    assert (made.name, str(made.status)) == ('t_join#1', 'scheduled')
    assert made.kwargs == {'a': {'n': 1}, 'b': {'n': 2}}
    waits = manager.storage.create_instance(manager.storage.tasks['t_each'])
    assert (waits.name, str(waits.status)) == ('t_each#1', 'unstarted')
    assert waits.kwargs == {'b': {'n': 2}}
    assert application_of(manager).released == ['t_each#0', 't_join#0', 't_join#1']
    assert manager.fire('a', {'n': 3}).released == ['t_each#1'], 'it takes the next payload'
    assert manager.storage['t_each#1'].kwargs['a'] == {'n': 3}


def test_an_instance_made_by_hand_may_wait_or_be_abandoned(medium: Medium):
    manager = medium.manager(MADE)
    assert str(manager.storage.create_instance('t_join').status) == 'unstarted'
    manager.fire('a')
    assert manager.fire('b').released == ['t_each#0', 't_join#0']
    manager.fire('never')
    assert str(manager.storage.create_instance('t_join').status) == 'abandoned'
    manager.cancel()
    assert str(manager.storage.create_instance('t_each').status) == 'abandoned'


def test_a_clone_receives_what_the_other_had_and_leaves_it_as_it_is(medium: Medium):
    manager = medium.manager(MADE)
    manager.fire('a', {'n': 1})
    manager.fire('b', {'n': 2})
    run = delivery(manager, 't_each#0')
    run.claim()
    run.finish(None)
    manager.fire('b', {'n': 9})
    clone = manager.storage.clone_instance('t_each#0')
    assert (clone.name, str(clone.status)) == ('t_each#1', 'scheduled')
    assert clone.kwargs == {'a': {'n': 1}, 'b': {'n': 2}}
    assert str(manager.storage['t_each#0'].status) == 'finished'
    waiting = medium.manager(MADE, 'order:2')
    waiting.fire('a')
    copy = waiting.storage.clone_instance(waiting.storage['t_join#0'])
    assert str(copy.status) == 'unstarted'
    assert waiting.fire('b').released == ['t_each#0', 't_join#0', 't_join#1']


def test_what_cannot_be_made_changes_nothing(medium: Medium):
    manager = medium.manager(MADE)
    manager.fire('a')
    before = manager.storage._read(Request(whole=True))
    with pytest.raises(InvalidConfiguration, match="no trigger task 't_no'; it has: t_each, t_j"):
        manager.storage.create_instance('t_no')
    with pytest.raises(UnknownInstance):
        manager.storage.clone_instance('t_join#7')
    with pytest.raises(TypeError, match='an instance or its name'):
        manager.storage.clone_instance(3)  # type: ignore[arg-type]
    after = manager.storage._read(Request(whole=True))
    assert (after.version, after.rows) == (before.version, before.rows)


def test_a_replay_with_kwargs_of_a_trigger_that_is_none_of_its_is_refused(medium: Medium):
    manager = medium.manager(MADE)
    manager.fire('a')
    manager.fire('b')
    manager.update_instance_status('t_join#0', 'failed')
    with pytest.raises(InvalidFiring, match='nothing to do with bb; its triggers are: a, b, never'):
        manager.replay_failed_instance('t_join#0', {'bb': {'n': 1}})
    assert str(manager.storage['t_join#0'].status) == 'failed'
    new = manager.replay_failed_instance('t_join#0', {'b': {'n': 1}})
    assert new.kwargs == {'a': {}, 'b': {'n': 1}}


def test_triggers_named_like_kombus_own_keys_are_triggers(medium: Medium):
    """kombu's JSON reads an object of just these two keys as something else."""
    names = ['__type__', '__value__']
    manager = medium.manager({'t_x': {'after': [*names, 'z'], 'run': 'x'}})
    for name in names:
        manager.fire(name, {'n': name})
    assert manager.storage['t_x#0'].kwargs == {name: {'n': name} for name in names}
    assert manager.fire('z').released == ['t_x#0']
    manager.update_instance_metadata('t_x#0', {'__type__': 'date'})
    with pytest.raises(InvalidFiring):
        manager.update_instance_metadata('t_x#0', {'__value__': 'boom'})
    assert manager.storage['t_x#0'].metadata == {'__type__': 'date'}
