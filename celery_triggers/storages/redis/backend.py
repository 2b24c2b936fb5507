"""Sessions in Redis: one Lua script for each read, commit and conditional write.

Keys, all of one session in one slot (a fixed number of shards)::

    <prefix>:{<shard>}:s:<uid>         hash: the session
    <prefix>:{<shard>}:w:<uid>         zset: which instances wait for which trigger
    <prefix>:{<shard>}:p:<uid, event>  string: what came of a change (ten minutes)
    <prefix>:{<shard>}:c:<digest>      string: a configuration
    <prefix>:{<shard>}:d               zset: due dates, of all sessions of the shard
    <prefix>:{<shard>}:z               string: when somebody last looked at them
    <prefix>:{<shard>}:g               hash: which instance waits at a gate, by task id
    <prefix>:{<shard>}:r               string: nothing; replicas that have it have the rest
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from celery_triggers.engine.names import instance_name, split_instance_name
from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import Question, StorageBackend
from celery_triggers.storages.records import (
    STATE_COLUMNS,
    Commit,
    Due,
    Request,
    Row,
    Slice,
    StorageTime,
    Taken,
    Write,
)
from celery_triggers.storages.redis.cluster import servers
from celery_triggers.storages.redis.server import Call, Command, Server

__all__ = ['RedisStorageBackend']

#: Sessions are spread over so many hash tags. Never change it: keys would move.
SHARDS = 64

_json = json.JSONEncoder(separators=(',', ':'), ensure_ascii=False).encode


@storage_backends.register('redis')
class RedisStorageBackend(StorageBackend):
    """Keeps a session in Redis (or Valkey), 6.2 or later."""

    key = 'redis'
    default_url = 'redis://localhost:6379/0'

    def _open(self) -> None:
        assert self.url is not None
        self._server = servers.get(self.url, options=self.options)
        base = _base(self.settings.key_prefix, self.uid)
        self._base = base
        self._keys = (f'{base}:s:{self.uid}', f'{base}:w:{self.uid}')
        self._dues = f'{base}:d'
        self._gates = f'{base}:g'
        # The length first, so that no session's entries look like another's.
        self._owner = f'{len(self.uid)}:{self.uid}'

    # ----------------------------------------------------------- the contract

    def _read(self, request: Request) -> Slice:
        return _slice(self._server.run(self._read_call(request)), request)

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        found = self._server.run(self._commit_call(commit, request), changes=True)
        return None if found is None else _slice(found, request)

    @classmethod
    def _answers(cls, questions: Sequence[Question]) -> list[Slice | Exception | None]:
        """Answer them in one round trip for each server that they are for."""
        calls = [
            (_own(question.storage)._server, _own(question.storage)._call(question))
            for question in questions
        ]
        answers: list[Slice | Exception | None] = []
        for question, found in zip(questions, _asked_of(calls), strict=True):
            if isinstance(found, StorageUnavailable):
                # Whoever only reads knows that nothing was changed.
                found.outcome_unknown = found.outcome_unknown and question.commit is not None
            elif found is not None:
                found = _slice(found, question.request)
            answers.append(found)
        return answers

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        return _written(self._server.run(self._write_call(write), changes=True))

    @classmethod
    def write_many(
        cls, writes: Sequence[tuple[StorageBackend, Write]]
    ) -> list[tuple[bool, Row | None] | StorageUnavailable]:
        """Make them in one round trip for each server that they are for."""
        calls = [
            (_own(storage)._server, _own(storage)._write_call(write)) for storage, write in writes
        ]
        return [
            found if isinstance(found, StorageUnavailable) else _written(found)
            for found in _asked_of(calls)
        ]

    def _delete(self, version: str | None = None) -> bool:
        keys = (*self._keys, self._dues, self._gates)
        call = 'delete', keys, (version or '', self._owner)
        return bool(self._server.run(call, changes=True))

    def _configuration(self, digest: str) -> str | None:
        text: str | None = self._server.ask('GET', f'{self._base}:c:{digest}')
        return text

    # ------------------------------------------------------ the place as a whole

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        server = cls._server_at(url, settings)
        space, literal = (_literal(text) for text in (settings.key_prefix, prefix))
        # A uid may look like the keys around it, which the pattern alone cannot tell.
        own = re.compile(re.escape(settings.key_prefix) + r':\{\d+\}:s:(.+)', re.DOTALL)
        pattern = f'{space}:{{*}}:s:{literal}*'
        matches = (own.fullmatch(key) for key in server.keys(pattern))
        return iter({match[1] for match in matches if match and match[1].startswith(prefix)})

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        arguments = (str(-(-limit // SHARDS)), str(push), str(gap))
        calls = [('take', (f'{s}:d', f'{s}:z'), arguments) for s in _shards(settings)]
        taken = Taken(0, [])
        for found in cls._server_at(url, settings).run_many(calls, changes=True):
            if isinstance(found, StorageUnavailable):
                # What the other shards gave comes again when its new date has come.
                raise found
            now, members, calm, more, following = found
            taken.now = max(taken.now, int(now))
            taken.more = taken.more or bool(more)
            if following:
                at = int(float(following))
                taken.next_at = at if taken.next_at is None else min(taken.next_at, at)
            for member, at in zip(members[::2], members[1::2], strict=True):
                taken.entries.append(Due(*_owned(member), int(float(at)), bool(calm)))
        return taken

    @classmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        commands: list[Command] = [('HMGET', f'{s}:g', *task_ids) for s in _shards(settings)]
        server = cls._server_at(url, settings)
        return {
            task_id: _owned(member)
            for members in (server.ask_many(commands) if task_ids else ())
            for task_id, member in zip(task_ids, members, strict=True)
            if member is not None
        }

    @classmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        server = cls._server_at(url, settings)
        for shard in _shards(settings):
            found = server.ask('ZRANGE', f'{shard}:d', 0, -1, 'WITHSCORES')
            # Pairs in version 3 of the protocol, else the two in turn.
            paired = found and isinstance(found[0], list)
            for member, at in found if paired else zip(found[::2], found[1::2], strict=True):
                yield (*_owned(member), int(float(at)))

    @classmethod
    def _server_at(cls, url: str | None, settings: Settings) -> Server:
        return servers.get(url or cls.default_url, options=settings.storage_options)

    # ---------------------------------------------------------------- helpers

    def _call(self, question: Question) -> Call:
        if question.commit is None:
            return self._read_call(question.request)
        return self._commit_call(question.commit, question.request)

    def _read_call(self, request: Request) -> Call:
        return 'read', (*self._keys, self._passing_key(request.passing)), (_asked(request),)

    def _commit_call(self, commit: Commit, request: Request) -> Call:
        event, text, seconds = commit.passing or (request.passing, '', 0)
        digest, configuration = commit.configuration or ('', '')
        keys = (
            *self._keys, self._passing_key(event), self._dues, f'{self._base}:c:{digest}',
            self._gates,
        )
        changes = [
            commit.expected,
            f'{commit.incarnation} {commit.version}',
            commit.head,
            commit.puts,
            commit.drops,
            [(name, str(row.rev - 1), _pack(row)) for name, row in commit.rows.items()],
            [_member(*wait) for wait in commit.waits_added],
            [_member(*wait) for wait in commit.waits_removed],
            text,
            seconds,
            configuration,
            self._owner,
            commit.dues,
            commit.gates,
        ]
        return 'commit', keys, (_asked(request), _json(changes))

    def _write_call(self, write: Write) -> Call:
        asked = [
            write.name,
            write.incarnation,
            [_pairs(guard) for guard in write.guards],
            _pairs(write.changes),
            '' if write.due is None else _text(write.due),
            self._owner,
        ]
        return 'write', (self._keys[0], self._dues), (_json(asked),)

    def _passing_key(self, event: str) -> str:
        name = f'{len(self.uid)}:{self.uid}{event}'
        return f'{self._base}:p:{hashlib.sha256(name.encode()).hexdigest()[:32]}'


def _own(storage: StorageBackend) -> RedisStorageBackend:
    assert isinstance(storage, RedisStorageBackend)
    return storage


def _asked_of(calls: Sequence[tuple[Server, Call]]) -> list[Any]:
    """Run scripts that may change something, sharing round trips; return answers or errors."""
    groups: dict[Server, dict[int, Call]] = {}
    for index, (server, call) in enumerate(calls):
        groups.setdefault(server, {})[index] = call
    answers: dict[int, Any] = {}
    for server, group in groups.items():
        found = server.run_many(list(group.values()), changes=True)
        answers.update(zip(group, found, strict=True))
    return [answers[index] for index in range(len(calls))]


def _shards(settings: Settings) -> Iterator[str]:
    for shard in range(SHARDS):
        yield f'{settings.key_prefix}:{{{shard}}}'


def _written(answer: tuple[int, str | None]) -> tuple[bool, Row | None]:
    applied, row = answer
    return bool(applied), _unpack(row) if row else None


def _owned(member: str) -> tuple[str, str]:
    """Return the uid and the name that a due date is of."""
    length, _, rest = member.partition(':')
    return rest[: int(length)], rest[int(length) :]


def _slice(text: str, request: Request) -> Slice:
    now, version, head, pairs, members, passing = json.loads(text)
    result = Slice(int(now), version.partition(' ')[2], head)
    # An empty list of Lua's comes as an empty object.
    for key, value in zip(pairs[::2] if pairs else (), pairs[1::2] if pairs else (), strict=True):
        if key.startswith('i:'):
            result.rows[key[2:]] = _unpack(value)
        elif key[1:2] == ':':
            result.entries[key] = value
    for member in members:
        trigger, name = _wait(member)
        if name in result.rows:
            result.waiting.setdefault(trigger, []).append(name)
    if passing:
        result.entries[f'p:{request.passing}'] = passing
    return result


def _asked(request: Request) -> str:
    if request.whole:
        return '[true]'
    prefixes = [_prefix(trigger) for trigger in request.triggers]
    return _json([False, request.entries, request.names, prefixes])


def _base(prefix: str, uid: str) -> str:
    return f'{prefix}:{{{zlib.crc32(uid.encode()) % SHARDS}}}'


def _literal(text: str) -> str:
    """Return a pattern of Redis that matches this text alone."""
    return re.sub(r'([*?\[\]\\^-])', r'\\\1', text)


def _prefix(trigger: str) -> str:
    # The length first, so that no trigger's range holds another's members.
    return f'{len(trigger)}:{trigger}:'


def _member(trigger: str, name: str) -> str:
    task, number = split_instance_name(name)
    return f'{_prefix(trigger)}{number:010d}:{task}'


def _wait(member: str) -> tuple[str, str]:
    length, _, rest = member.partition(':')
    trigger, rest = rest[: int(length)], rest[int(length) + 1 :]
    return trigger, instance_name(rest[11:], int(rest[:10]))


def _pairs(columns: Mapping[str, Any]) -> list[tuple[int, str]]:
    return [(STATE_COLUMNS.index(name) + 1, _text(value)) for name, value in columns.items()]


def _text(value: Any) -> str:
    if isinstance(value, StorageTime):
        return f'+{value.offset}'
    return _escape(str(value))


_SEPARATORS = frozenset('%|\n+')


def _escape(text: str) -> str:
    """Keep the separators of a packed row out of a column."""
    if _SEPARATORS.isdisjoint(text):
        return text
    for char in '%|\n+':
        text = text.replace(char, f'%{ord(char):02X}')
    return text


def _unescape(text: str) -> str:
    for char in '+\n|%':
        text = text.replace(f'%{ord(char):02X}', char)
    return text


def _pack(row: Row) -> str:
    return '|'.join(_escape(str(value)) for value in row[:-1]) + '\n' + row.body


def _unpack(packed: str) -> Row:
    state, _, body = packed.partition('\n')
    (
        rev, status, attempt, token, lease, sends, eta, changed, claimed, loss, spared, task_id,
    ) = state.split('|')
    return Row(
        int(rev),
        status,
        int(attempt),
        _unescape(token),
        int(lease),
        int(sends),
        int(eta),
        int(changed),
        int(claimed),
        _unescape(loss),
        int(spared),
        _unescape(task_id),
        body,
    )
