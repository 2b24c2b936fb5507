"""The tables of the storage ``django``: see :mod:`celery_triggers.storages.relational`.

A model has one column as its primary key, so keys of several columns are constraints.
Several applications can keep their sessions here, each under its ``triggers_key_prefix``:
the key of a session is a hash of prefix and uid, and what is looked for in the whole place
has the prefix beside it.

Nobody writes these tables but the storage: a session changes through its trigger manager.
"""

from __future__ import annotations

from typing import Any

from django.db import models

from celery_triggers.contrib.django.fields import ExactCharField, ExactTextField

__all__ = [
    'Configuration', 'Due', 'Entry', 'Gate', 'Inbox', 'Instance', 'Passing', 'Session', 'Sweep',
    'Waiting',
]

#: How many characters ``triggers_key_prefix`` may have, and how many of a uid are indexed.
MOST_PREFIX = 100
START_OF_UID = 100


def _key(**options: Any) -> ExactCharField:
    return ExactCharField(max_length=32, **options)


class Session(models.Model):
    """The container of one workflow's state."""

    sid = _key(primary_key=True)
    prefix = ExactCharField(max_length=MOST_PREFIX)
    # Of a uid of any length no database makes an index.
    start = ExactCharField(max_length=START_OF_UID)
    uid = ExactTextField()
    version = ExactCharField(max_length=16)
    incarnation = ExactCharField(max_length=32)
    head = ExactTextField()

    class Meta:
        indexes = [models.Index(fields=['prefix', 'start'], name='triggers_session_start')]

    def __str__(self) -> str:
        return str(self.uid)


class Entry(models.Model):
    """A count, the latest kwargs of a trigger, an event id, a line of the history."""

    sid = _key()
    eid = _key()
    name = ExactTextField()
    value = ExactTextField()

    class Meta:
        verbose_name_plural = 'entries'
        constraints = [
            models.UniqueConstraint(fields=['sid', 'eid'], name='triggers_entry_key')
        ]

    def __str__(self) -> str:
        return str(self.name)


class Instance(models.Model):
    """One execution of a trigger task. The columns are those of a row."""

    sid = _key()
    iid = _key()
    name = ExactTextField()
    rev = models.IntegerField()
    status = ExactCharField(max_length=16)
    attempt = models.IntegerField()
    token = ExactTextField()
    lease = models.BigIntegerField()
    sends = models.IntegerField()
    eta = models.BigIntegerField()
    changed = models.BigIntegerField()
    claimed = models.BigIntegerField()
    loss = ExactTextField()
    spared = models.IntegerField()
    task_id = ExactTextField()
    body = ExactTextField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=['sid', 'iid'], name='triggers_instance_key')
        ]

    def __str__(self) -> str:
        return str(self.name)


class Waiting(models.Model):
    """That an instance waits for a trigger."""

    sid = _key()
    tid = _key()
    iid = _key()
    trigger = ExactTextField()

    class Meta:
        verbose_name_plural = 'waiting'
        constraints = [
            models.UniqueConstraint(fields=['sid', 'tid', 'iid'], name='triggers_waiting_key')
        ]


class Passing(models.Model):
    """What came of a change, for ten minutes."""

    sid = _key()
    eid = _key()
    value = ExactTextField()
    until = models.BigIntegerField()

    class Meta:
        verbose_name_plural = 'passing'
        constraints = [
            models.UniqueConstraint(fields=['sid', 'eid'], name='triggers_passing_key')
        ]
        indexes = [models.Index(fields=['until'], name='triggers_passing_until')]


class Configuration(models.Model):
    """The trigger tasks of sessions, stored once, by content."""

    prefix = ExactCharField(max_length=MOST_PREFIX)
    digest = _key()
    text = ExactTextField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=['prefix', 'digest'], name='triggers_configuration_key'
            )
        ]


class Due(models.Model):
    """An instance's due date, or the session's own under the hash of no name."""

    prefix = ExactCharField(max_length=MOST_PREFIX)
    sid = _key()
    iid = _key()
    uid = ExactTextField()
    name = ExactTextField()
    at = models.BigIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=['sid', 'iid'], name='triggers_due_key')]
        indexes = [models.Index(fields=['prefix', 'at'], name='triggers_due_at')]


class Gate(models.Model):
    """A gate that waits, by the hash of its task id."""

    prefix = ExactCharField(max_length=MOST_PREFIX)
    gid = _key()
    sid = _key()
    uid = ExactTextField()
    name = ExactTextField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=['prefix', 'gid'], name='triggers_gate_key')
        ]
        indexes = [models.Index(fields=['sid'], name='triggers_gate_session')]


class Sweep(models.Model):
    """When somebody last looked at due dates; one row for each prefix."""

    prefix = ExactCharField(max_length=MOST_PREFIX, primary_key=True)
    taken_at = models.BigIntegerField()
    restless_until = models.BigIntegerField()


class Inbox(models.Model):
    """A firing that is part of a transaction of the application's."""

    id = _key(primary_key=True)
    prefix = ExactCharField(max_length=MOST_PREFIX)
    sid = _key()
    uid = ExactTextField()
    fired = models.BigIntegerField()
    at = models.BigIntegerField()
    body = ExactTextField()

    class Meta:
        verbose_name_plural = 'inbox'
        indexes = [
            models.Index(fields=['prefix', 'at'], name='triggers_inbox_at'),
            models.Index(fields=['sid'], name='triggers_inbox_session'),
        ]
