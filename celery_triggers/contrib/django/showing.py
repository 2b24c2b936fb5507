"""What the admin shows of sessions and instances."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from celery_triggers.contrib.django.models import Instance, Session
from celery_triggers.engine.explain import explain
from celery_triggers.engine.names import split_instance_name
from celery_triggers.engine.session import Head
from celery_triggers.engine.transitions import UNHAPPY, Status
from celery_triggers.exceptions import TriggersError
from celery_triggers.storages.records import Row
from celery_triggers.storages.relational.backend import told
from celery_triggers.storages.translation import head_from_text, row_to_instance
from celery_triggers.storages.view import TaskInstance, moment

__all__ = ['Page', 'ShownInstance', 'head_of', 'know_reasons', 'know_sessions', 'page_of']

#: How many instances and firings of a session one page shows, and characters of a value.
MOST_INSTANCES = 200
MOST_FIRINGS = 100
MOST_CHARACTERS = 5000

#: What should be seen first.
_FIRST = (Status.FAILED, Status.REVOKED, Status.RUNNING, Status.SCHEDULED, Status.UNSTARTED)


def head_of(session: Session) -> Head:
    """Return what a session's row says of it; nothing, if a newer version has written it."""
    known = getattr(session, '_head', None)
    if known is None:
        try:
            known = head_from_text(told(session.head))
        except TriggersError:
            known = Head()
        session._head = known
    return known


def know_sessions(instances: Iterable[Instance]) -> list[Instance]:
    """Give instances their ``session``; return those that have one, by one query for all."""
    shown = list(instances)
    if not shown:
        return []
    sessions = Session._default_manager.using(shown[0]._state.db).in_bulk(
        {instance.sid for instance in shown}
    )
    for instance in shown:
        # One that has just been deleted has none.
        instance.session = sessions.get(instance.sid)
    return [instance for instance in shown if instance.session is not None]


def know_reasons(services: Any, instances: Iterable[Instance]) -> None:
    """Give instances their ``session`` and a ``reason`` for their status."""
    for instance in know_sessions(instances):
        try:
            instance.reason = _reason(services, instance)
        except TriggersError as exc:
            instance.reason = str(exc)


def _reason(services: Any, instance: Instance) -> str:
    storage = services.storage(told(instance.session.uid))
    row = Row(*(getattr(instance, name) for name in Row._fields))
    record = row_to_instance(
        told(instance.name), row._replace(body=told(row.body)), storage.codec
    )
    # Most sessions share a few configurations, which stay in memory.
    config = storage.configuration(head_of(instance.session).digest).get(record.task)
    found = explain(config, [record])
    return _without_name(found[0].text, record.name, record.status.value) if found else ''


def _without_name(text: str, name: str, status: str) -> str:
    """Return an explanation without its beginning, which stands beside it."""
    return text.removeprefix(f'{name} is {status}').strip(' :')


@dataclass(slots=True)
class ShownInstance:
    """An instance on the page of its session."""

    instance: TaskInstance
    reason: str

    @property
    def is_unhappy(self) -> bool:
        return self.instance.status in UNHAPPY

    @property
    def kwargs(self) -> str:
        return _pretty(self.instance.kwargs)

    @property
    def result(self) -> str:
        return _pretty(self.instance.result)

    @property
    def metadata(self) -> str:
        known = {'result', 'reason', 'exception', 'parent'}
        rest = {k: v for k, v in self.instance.metadata.items() if k not in known}
        return _pretty(rest) if rest else ''

    @property
    def parent(self) -> str:
        return str(self.instance.metadata.get('parent', ''))

    @property
    def exception(self) -> dict[str, Any]:
        found = self.instance.metadata.get('exception')
        return found if isinstance(found, dict) else {}

    @property
    def exception_context(self) -> str:
        context = self.exception.get('context')
        return _pretty(context) if context else ''

    @property
    def times(self) -> list[tuple[str, Any]]:
        """When it came to each status, in order."""
        return sorted(self.instance.timestamps.items(), key=lambda item: item[1])


@dataclass(slots=True)
class Page:
    """The page of a session."""

    head: Head
    created: Any
    changed: Any
    instances: list[ShownInstance] = field(default_factory=list)
    more_instances: int = 0
    without_instance: list[str] = field(default_factory=list)
    firings: list[dict[str, Any]] = field(default_factory=list)
    more_firings: int = 0
    delayed: list[dict[str, Any]] = field(default_factory=list)


def page_of(manager: Any) -> Page:
    """Return what a session's page shows.

    Raises:
        TriggersError: The session cannot be read.
    """
    explanations = manager.explain()
    reasons = {e.instance: e.text for e in explanations if e.instance is not None}
    session = manager.storage.load()
    head: Head = session.head
    wrapped = [manager.storage.wrap(session, record) for record in session.instances.values()]
    shown = [
        ShownInstance(one, _without_name(reasons.get(one.name, ''), one.name, one.status.value))
        for one in wrapped
    ]
    shown.sort(key=_rank)
    return Page(
        head,
        moment(head.created) if head.created else None,
        moment(head.clock) if head.clock else None,
        shown[:MOST_INSTANCES],
        max(0, len(shown) - MOST_INSTANCES),
        [e.text for e in explanations if e.instance is None],
        [_firing(record) for record in reversed(session.history[-MOST_FIRINGS:])],
        max(0, head.firings - MOST_FIRINGS),
        [
            {'event_id': event_id, 'trigger': delayed.trigger, 'due': moment(delayed.due)}
            for event_id, delayed in sorted(session.delayed.items(), key=lambda d: d[1].due)
        ],
    )


def _rank(shown: ShownInstance) -> tuple[Any, ...]:
    status = shown.instance.status
    place = _FIRST.index(status) if status in _FIRST else len(_FIRST)
    return place, *split_instance_name(shown.instance.name)


def _firing(record: Any) -> dict[str, Any]:
    return {
        'number': record.number, 'trigger': record.trigger, 'at': moment(record.at),
        'kwargs': _pretty(record.kwargs) if record.kwargs else '',
        'cause': record.cause or '', 'event_id': record.event_id or '',
        'heard_by': record.heard_by,
    }


def _pretty(value: Any) -> str:
    """Return a value as JSON for people, as much of it as a page can show."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=repr)
    if len(text) > MOST_CHARACTERS:
        return f'{text[:MOST_CHARACTERS]}\n... ({len(text):,} characters)'
    return text
