"""Between the engine's objects and what a storage keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.gates import Gate
from celery_triggers.engine.instances import Instance
from celery_triggers.engine.names import split_instance_name
from celery_triggers.engine.session import (
    Counts,
    Delayed,
    EventRecord,
    FiringRecord,
    Head,
    Latest,
    Plan,
    Session,
)
from celery_triggers.engine.transitions import Status
from celery_triggers.exceptions import TriggersError
from celery_triggers.storages.codec import Codec
from celery_triggers.storages.records import FORMAT, Commit, Request, Row, Slice

#: How many seconds an event id is kept that nobody chose: long enough to find out
#: whether a commit whose answer was lost had been applied.
PASSING_SECONDS = 600

_compact = json.JSONEncoder(separators=(',', ':')).encode

#: The names of a head's fields as they are stored: every session has them, and a
#: million waiting sessions should fit.
_HEAD_SHORT = {
    'incarnation': 'i',
    'digest': 'c',
    'manager': 'm',
    'created': 'b',
    'clock': 't',
    'firings': 'n',
    'unresolved': 'u',
    'finalized': 'z',
    'cancelled': 'x',
    'metadata': 'd',
    'begun': 'g',
    'gates': 'w',
    'aside': 'a',
}
_HEAD_NAMES = {short: name for name, short in _HEAD_SHORT.items()}
_HEAD_KEYS = [(name, short, getattr(Head(), name)) for name, short in _HEAD_SHORT.items()]


#: What a row's body holds besides the kwargs; what is empty is left out.
_BODY = (
    'metadata', 'times', 'depth', 'log_level', 'logs_resolved', 'lost', 'message', 'cascade',
    'until',
)


def to_request(plan: Plan, passing: str = '') -> Request:
    """Return what to read for a plan."""
    if plan.whole:
        return Request(whole=True, passing=passing)
    return Request(
        entries=[
            *(f't:{task}' for task in plan.tasks),
            *(f'l:{trigger}' for trigger in plan.latest),
            *(f'e:{event}' for event in plan.events | plan.delayed),
            *(f'd:{event}' for event in plan.delayed),
        ],
        names=list(plan.instances),
        triggers=list(plan.waiting),
        passing=passing,
    )


def head_to_text(head: Head) -> str:
    """Return a session's head as JSON; what has its default is left out."""
    values: dict[str, Any] = {'format': FORMAT}
    for name, key, default in _HEAD_KEYS:
        value = getattr(head, name)
        if value != default:
            values[key] = value
    return _compact(values)


def head_from_text(text: str) -> Head:
    """Read a session's head.

    Raises:
        TriggersError: A newer version of this package wrote it.
    """
    if not text:
        return Head()
    values = json.loads(text)
    written = values.pop('format')
    if written > FORMAT:
        raise TriggersError(
            f'a newer version of celery_triggers stored this session (format {written}, '
            f'this one knows {FORMAT}); upgrade this process'
        )
    if written < FORMAT:
        raise TriggersError(
            f'an unreleased version of celery_triggers stored this session (format {written}, '
            f'this one knows {FORMAT}); delete it, or finish it with that version'
        )
    return Head(**{_HEAD_NAMES[key]: value for key, value in values.items()})


def instance_to_row(instance: Instance, codec: Codec) -> Row:
    """Return an instance as a row, one revision on."""
    # Pairs, since kombu's JSON reads an object with certain keys as something else.
    body: dict[str, Any] = {'kwargs': list(instance.received.items())}
    for name in _BODY:
        value = getattr(instance, name)
        if value:
            body[name] = value
    if instance.gate is not None:
        body['gate'] = instance.gate.stored()
    return Row(
        instance.rev + 1,
        instance.status.value,
        instance.attempt,
        instance.token,
        instance.lease,
        instance.sends,
        instance.eta,
        instance.changed,
        instance.claimed,
        instance.loss,
        instance.spared,
        instance.task_id,
        codec.dumps(body),
    )


def row_to_instance(name: str, row: Row, codec: Codec) -> Instance:
    """Return the instance that a row holds."""
    task, number = split_instance_name(name)
    body = codec.loads(row.body)
    gate = body.pop('gate', None)
    return Instance(
        task,
        number,
        status=Status(row.status),
        attempt=row.attempt,
        task_id=row.task_id,
        token=row.token,
        lease=row.lease,
        sends=row.sends,
        eta=row.eta,
        rev=row.rev,
        changed=row.changed,
        claimed=row.claimed,
        loss=row.loss,
        spared=row.spared,
        received=dict(body.pop('kwargs')),
        gate=Gate(**gate) if gate is not None else None,
        **body,
    )


def to_session(
    uid: str, found: Slice, configuration: Configuration, plan: Plan, codec: Codec
) -> Session:
    """Return the slice of a session as the engine works on it."""
    session = Session(uid, head_from_text(found.head), configuration, plan)
    for key, text in found.entries.items():
        kind, name = key[0], key[2:]
        if kind == 't':
            session.counts[name] = Counts(*map(int, text.split(',')))
        elif kind == 'l':
            session.latest[name] = _latest_from_text(text, codec)
        elif kind == 'd':
            session.delayed[name] = Delayed(*codec.loads(text))
        elif kind == 'h':
            session.history.append(FiringRecord(int(name), *codec.loads(text)))
        else:
            session.events[name] = EventRecord(**json.loads(text))
    session.history.sort(key=lambda record: record.number)
    for name, row in found.rows.items():
        session.instances[name] = row_to_instance(name, row, codec)
    session.waiting = {trigger: set(names) for trigger, names in found.waiting.items()}
    return session


def to_commit(draft: Draft, found: Slice, version: str, codec: Codec, history: int) -> Commit:
    """Return what a step changed.

    Args:
        step: A step that was decided on ``found``.
        version: The new version token.
        history: How many firings the session's history may hold.
    """
    session = draft.session
    session.head.clock = draft.now
    configuration = draft.new_configuration
    lasting = {e: r for e, r in draft.events.items() if r.lasting}
    passing = {e: r for e, r in draft.events.items() if not r.lasting}
    commit = Commit(
        expected=found.version,
        version=version,
        incarnation=session.head.incarnation,
        head=head_to_text(session.head),
        puts=_changed_entries(draft, lasting, codec, history),
        drops=[
            *_outdated_history(draft, history),
            *(f'd:{event}' for event in draft.delayed if event not in session.delayed),
        ],
        rows={name: instance_to_row(i, codec) for name, i in draft.touched.items()},
        waits_added=sorted(draft.waits_added),
        waits_removed=sorted(draft.waits_removed),
        configuration=(
            (configuration.digest, configuration.text) if configuration is not None else None
        ),
        dues=dict(draft.dues),
        gates=dict(draft.gates),
    )
    for event, record in passing.items():
        commit.passing = (event, _event_to_text(record), PASSING_SECONDS)
    return commit


def _changed_entries(
    draft: Draft, events: Mapping[str, EventRecord], codec: Codec, history: int
) -> dict[str, str]:
    session = draft.session
    puts: dict[str, str] = {}
    for task in draft.counted:
        counts = session.counts[task]
        puts[f't:{task}'] = f'{counts.total},{counts.unresolved},{counts.unstarted}'
    for trigger in draft.fired:
        puts[f'l:{trigger}'] = _latest_to_text(session.latest[trigger], codec)
    for event in draft.delayed.intersection(session.delayed):
        delayed = session.delayed[event]
        puts[f'd:{event}'] = codec.dumps([delayed.trigger, delayed.kwargs, delayed.due])
    for event, record in events.items():
        puts[f'e:{event}'] = _event_to_text(record)
    for firing in draft.records[-history:] if history else ():
        puts[f'h:{firing.number}'] = codec.dumps(
            [firing.trigger, firing.kwargs, firing.at, firing.event_id, firing.cause,
             firing.heard_by]
        )
    return puts


def _latest_to_text(latest: Latest, codec: Codec) -> str:
    content: Any = latest.kwargs
    if latest.matches:
        content = [content, [[w, m.count, m.kwargs] for w, m in latest.matches.items()]]
    return f'{latest.count}:{codec.dumps(content)}'


def _latest_from_text(text: str, codec: Codec) -> Latest:
    count, _, content = text.partition(':')
    kwargs = codec.loads(content)
    if isinstance(kwargs, dict):
        return Latest(int(count), kwargs)
    # A list, or a tuple where the serializer keeps those.
    kwargs, matches = kwargs
    return Latest(int(count), kwargs, {w: Latest(number, last) for w, number, last in matches})


def _outdated_history(draft: Draft, history: int) -> list[str]:
    last = draft.session.head.firings
    return [
        f'h:{number - history}'
        for number in range(last - len(draft.records) + 1, last + 1)
        if history and number > history and number - history <= last - len(draft.records)
    ]


def _event_to_text(record: EventRecord) -> str:
    return _compact({name: getattr(record, name) for name in EventRecord.__slots__})
