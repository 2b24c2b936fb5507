"""Sessions in Redis: one Lua script for each read, commit and conditional write.

Keys, all of one session in one slot (a fixed number of shards)::

    <prefix>:{<shard>}:s:<uid>         hash: the session
    <prefix>:{<shard>}:w:<uid>         zset: which instances wait for which trigger
    <prefix>:{<shard>}:p:<uid, event>  string: what came of a change (ten minutes)
    <prefix>:{<shard>}:c:<digest>      string: a configuration
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_triggers.engine.names import instance_name, split_instance_name
from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.forks import ForkGate
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.base import Question, Shared, StorageBackend, public_url
from celery_triggers.storages.records import (
    STATE_COLUMNS,
    Commit,
    Request,
    Row,
    Slice,
    StorageTime,
    Write,
)

__all__ = ['RedisStorageBackend']

#: Sessions are spread over so many hash tags. Never change it: keys would move.
SHARDS = 64

#: What redis-py is told unless ``triggers_storage_options`` says otherwise (seconds).
#: Its own retries are off: :meth:`RedisStorageBackend._run` repeats what is safe.
CLIENT_OPTIONS: dict[str, Any] = {'socket_timeout': 5.0, 'socket_connect_timeout': 2.0}

_DOWN = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
)

#: A script's name, its keys and its arguments.
Call = tuple[str, Sequence[str], Sequence[str]]

_json = json.JSONEncoder(separators=(',', ':'), ensure_ascii=False).encode

#: A fork waits a little for the calls of other threads, which may hold a lock of redis-py,
#: or of an import that it makes when it first connects.
_gate = ForkGate(patience=1.0)


def _read_script(name: str) -> tuple[str, str]:
    folder = files('celery_triggers.storages') / 'lua'
    text = '\n'.join((folder / f'{part}.lua').read_text() for part in ('slice', name))
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


#: The scripts by name, each with its SHA1 digest. They are read when the module is imported,
#: since reading them imports others, in the middle of which a child could be forked.
_SCRIPTS = {name: _read_script(name) for name in ('read', 'commit', 'write')}


def _new_client(url: str, options: dict[str, Any]) -> redis.Redis:
    try:
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            **{**CLIENT_OPTIONS, **options},
        )
        # Made without connecting, to find out now whether it understands its options.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError) as exc:
        raise StorageNotConfigured(
            f'triggers_storage ({public_url(url)}) or triggers_storage_options ({options}) '
            f'are nothing that redis-py understands: {exc}'
        ) from exc
    return client


#: This process's clients; the connections of each are pooled.
_clients: Shared[redis.Redis] = Shared(_new_client)


def _renew_pools() -> None:
    """Give each client a new pool in a forked child.

    redis-py notices the fork too, but then waits for a lock of its pool, which a thread
    of the parent may have held.
    """
    for client in _clients:
        old = client.connection_pool
        client.connection_pool = type(old)(
            connection_class=old.connection_class,
            max_connections=old.max_connections,
            **old.connection_kwargs,
        )


os.register_at_fork(after_in_child=_renew_pools)


@storage_backends.register('redis')
class RedisStorageBackend(StorageBackend):
    """Keeps a session in Redis (or Valkey), 6.2 or later."""

    key = 'redis'
    default_url = 'redis://localhost:6379/0'

    def _open(self) -> None:
        assert self.url is not None
        self._client = _clients.get(self.url, options=self.options)
        base = _base(self.settings.key_prefix, self.uid)
        self._base = base
        self._keys = (f'{base}:s:{self.uid}', f'{base}:w:{self.uid}')

    # ----------------------------------------------------------- the contract

    def _read(self, request: Request) -> Slice:
        return _slice(self._run(*self._read_call(request)), request)

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        found = self._run(*self._commit_call(commit, request), changes=True)
        return None if found is None else _slice(found, request)

    @classmethod
    def _answers(cls, questions: Sequence[Question]) -> list[Slice | Exception | None]:
        """Answer them in one round trip for each server that they are for."""
        if len(questions) < 2:
            return super()._answers(questions)
        clients: dict[Any, dict[int, Question]] = {}
        for index, question in enumerate(questions):
            clients.setdefault(_own(question)._client, {})[index] = question
        found: dict[int, Slice | Exception | None] = {}
        for client, group in clients.items():
            found.update(zip(group, _pipelined(client, list(group.values())), strict=True))
        return [found[index] for index in range(len(questions))]

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        asked = [
            write.name,
            write.incarnation,
            [_pairs(guard) for guard in write.guards],
            _pairs(write.changes),
        ]
        applied, row = self._run('write', self._keys[:1], (_json(asked),), changes=True)
        return bool(applied), _unpack(row) if row else None

    def _delete(self) -> bool:
        return bool(self._guarded(self._client.delete, *self._keys, changes=True))

    def _configuration(self, digest: str) -> str | None:
        text: str | None = self._guarded(self._client.get, f'{self._base}:c:{digest}')
        return text

    @classmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        url = url or cls.default_url
        client = _clients.get(url, options=settings.storage_options)
        space, literal = (_literal(text) for text in (settings.key_prefix, prefix))
        # A uid may look like the keys around it, which the pattern alone cannot tell.
        own = re.compile(re.escape(settings.key_prefix) + r':\{\d+\}:s:(.+)', re.DOTALL)
        found = set()
        try:
            for key in client.scan_iter(f'{space}:{{*}}:s:{literal}*', count=1000):
                match = own.fullmatch(key)
                if match and match[1].startswith(prefix):
                    found.add(match[1])
        except _DOWN as exc:
            raise StorageUnavailable(f'Redis at {public_url(url)} did not answer: {exc}') from exc
        return iter(found)

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
        keys = (*self._keys, self._passing_key(event), f'{self._base}:c:{digest}')
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
        ]
        return 'commit', keys, (_asked(request), _json(changes))

    def _passing_key(self, event: str) -> str:
        name = f'{len(self.uid)}:{self.uid}{event}'
        return f'{self._base}:p:{hashlib.sha256(name.encode()).hexdigest()[:32]}'

    def _run(
        self, name: str, keys: Sequence[str], args: Sequence[str], *, changes: bool = False
    ) -> Any:
        command = self._client.execute_command
        try:
            return self._guarded(command, *_by_digest(name, keys, args), changes=changes)
        except redis.exceptions.NoScriptError:
            text = _SCRIPTS[name][0]
            return self._guarded(
                command, 'EVAL', text, len(keys), *keys, *args, changes=changes
            )

    def _guarded(self, call: Any, *args: Any, changes: bool = False) -> Any:
        """Call Redis; repeat once, since a pooled connection may have been closed.

        Repeating a change is safe: a commit meets its own version, and a conditional
        write its own token.
        """
        try:
            try:
                with _gate:
                    return call(*args)
            except redis.exceptions.ConnectionError:
                time.sleep(0.01)
                with _gate:
                    return call(*args)
        except redis.exceptions.NoScriptError:
            raise
        except redis.exceptions.ResponseError as exc:
            raise StorageUnavailable(
                f'Redis at {self.place} refused: {exc}', outcome_unknown=changes
            ) from exc
        except _DOWN as exc:
            raise StorageUnavailable(
                f'Redis at {self.place} did not answer: {exc}', outcome_unknown=changes
            ) from exc


def _by_digest(name: str, keys: Sequence[str], args: Sequence[str]) -> tuple[Any, ...]:
    return ('EVALSHA', _SCRIPTS[name][1], len(keys), *keys, *args)


def _own(question: Question) -> RedisStorageBackend:
    assert isinstance(question.storage, RedisStorageBackend)
    return question.storage


def _pipelined(
    client: Any, questions: Sequence[Question]
) -> list[Slice | Exception | None]:
    """Ask one server everything at once."""
    commands = [_by_digest(*_own(question)._call(question)) for question in questions]

    def send() -> list[Any]:
        with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            return answers

    try:
        found = _own(questions[0])._guarded(send)
    except StorageUnavailable as exc:
        return [
            StorageUnavailable(str(exc), outcome_unknown=question.commit is not None)
            for question in questions
        ]
    return [_answer(*pair) for pair in zip(questions, found, strict=True)]


def _answer(question: Question, found: Any) -> Slice | Exception | None:
    if isinstance(found, redis.exceptions.NoScriptError):
        # A server that was restarted: asking alone teaches it the script.
        return StorageBackend._answers([question])[0]
    if isinstance(found, _DOWN):
        return StorageUnavailable(f'Redis at {question.storage.place} refused: {found}')
    if found is None or isinstance(found, Exception):
        return found
    return _slice(found, question.request)


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
    rev, status, attempt, token, lease, sends, due, changed, claimed, task_id = state.split('|')
    return Row(
        int(rev),
        status,
        int(attempt),
        _unescape(token),
        int(lease),
        int(sends),
        int(due),
        int(changed),
        int(claimed),
        _unescape(task_id),
        body,
    )
