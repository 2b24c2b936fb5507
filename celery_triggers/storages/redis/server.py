"""A Redis server as the storage uses it: scripts, and what is done when it is down."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from copy import copy
from importlib.resources import files
from typing import Any

import redis
from redis.exceptions import (
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.sentinel import MasterNotFoundError

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.forks import ForkGate
from celery_triggers.storages.redis.address import Address

__all__ = ['Call', 'Command', 'Server', 'answers_of']

#: A script's name, its keys and its arguments.
Call = tuple[str, Sequence[str], Sequence[str]]

#: A command as redis-py sends it. The key that says where it goes stands in its usual place.
Command = tuple[Any, ...]

DOWN = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)

#: Refusals that come before a script has written anything.
_REFUSALS = (ReadOnlyError, OutOfMemoryError, ClusterDownError, TryAgainError)
_REFUSAL_CODES = ('NOREPLICAS', 'MISCONF')

#: A fork waits a little for the calls of other threads, which may hold a lock of redis-py,
#: or of an import that it makes when it first connects.
gate = ForkGate(patience=1.0)


def _read_script(name: str) -> tuple[str, str]:
    folder = files('celery_triggers.storages.redis') / 'lua'
    text = '\n'.join((folder / f'{part}.lua').read_text() for part in ('slice', name))
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


#: The scripts by name, each with its SHA1 digest. They are read when the module is imported,
#: since reading them imports others, in the middle of which a child could be forked.
_SCRIPTS = {name: _read_script(name) for name in ('read', 'commit', 'write', 'delete', 'take')}

#: The scripts by digest.
TEXTS = {digest: text for text, digest in _SCRIPTS.values()}


class Unconfirmed(RedisError):
    """Too few replicas have confirmed what an answer rests on."""


class Server:
    """One server, or what stands for one behind a URL; its connections are pooled."""

    def __init__(self, address: Address):
        self.address = address
        self.client = address.client()

    def run(self, call: Call, *, changes: bool = False) -> Any:
        """Run a script.

        Args:
            changes: Whether it changes something, so that without an answer it is unknown
                whether it did.

        Raises:
            StorageUnavailable: No answer came, or it was a refusal.
        """
        return answers_of(self.run_many([call], changes=changes))[0]

    def run_many(self, calls: Sequence[Call], *, changes: bool = False) -> list[Any]:
        """Run scripts, those for one server in one round trip.

        Returns:
            For each its answer, or the ``StorageUnavailable`` that running it raised.
        """
        return self._send([_by_digest(call) for call in calls], changes)

    def ask(self, *command: Any) -> Any:
        """Send a command that reads.

        Raises:
            StorageUnavailable: No answer came, or it was a refusal.
        """
        return self.ask_many([command])[0]

    def ask_many(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands that read, those for one server in one round trip.

        Raises:
            StorageUnavailable: An answer is missing, or one was a refusal.
        """
        return answers_of(self._send(commands, False))

    def keys(self, pattern: str) -> list[str]:
        """Return the keys that match, each at least once.

        Raises:
            StorageUnavailable: An answer is missing, or one was a refusal.
        """
        return self._keys_at(self.client, pattern)

    def _keys_at(self, client: redis.Redis, pattern: str) -> list[str]:
        return self._guarded(lambda: list(client.scan_iter(pattern, count=1000)))[0]

    def renew(self) -> None:
        """Take a new client in a forked child.

        redis-py notices the fork too, but then waits for a lock of its pool, which a thread
        of the parent may have held.
        """
        forsake(self.client)
        self.client = self.address.client()

    # ---------------------------------------------------------------- sending

    def _send(self, commands: Sequence[Command], changes: bool) -> list[Any]:
        def send() -> list[Any]:
            found = self._exchange(self.client, commands)
            unknown = [at for at, one in enumerate(found) if isinstance(one, NoScriptError)]
            if unknown:
                texts = [with_text(commands[at]) for at in unknown]
                for at, answer in zip(unknown, self._exchange(self.client, texts), strict=True):
                    found[at] = answer
            return found

        alone = len(commands) == 1 and not self.address.replicas
        try:
            found, lost = self._guarded(send, changes=changes, alone=alone)
        except StorageUnavailable as exc:
            # One for each, since each is told whose it is.
            return [exc, *(copy(exc) for _ in commands[1:])]
        if self.address.kind == 'sentinel' and any(isinstance(one, RedisError) for one in found):
            # A master that refuses may be one no longer: the next call asks the Sentinels.
            self.client.connection_pool.disconnect(inuse_connections=False)
        return [
            self.unavailable(one, changes, lost) if isinstance(one, RedisError) else one
            for one in found
        ]

    def _exchange(
        self, client: Any, commands: Sequence[Command], asking: bool = False
    ) -> list[Any]:
        """Send commands to one server in one round trip; return answers and refusals."""
        closing = self._closing(commands)
        if len(commands) == 1 and not closing and not asking:
            # No pipeline, which costs as much as a call.
            try:
                return [client.execute_command(*commands[0])]
            except ResponseError as exc:
                return [exc]
        sent: list[Command] = [*commands, *closing]
        if asking:
            sent = [part for command in sent for part in (('ASKING',), command)]
        pipeline: Any
        with client.pipeline(transaction=False) as pipeline:
            for command in sent:
                pipeline.execute_command(*command)
            found: list[Any] = pipeline.execute(raise_on_error=False)
        if asking:
            found = found[1::2]
        if closing:
            *found, written, confirmed = found
            refusal = next((one for one in (written, confirmed) if isinstance(one, RedisError)), 0)
            if refusal or confirmed < self.address.replicas:
                wanted = f'wait_replicas = {self.address.replicas}'
                missing = Unconfirmed(f'{wanted}: {refusal or confirmed}')
                return [one if isinstance(one, RedisError) else missing for one in found]
        return found

    def _closing(self, commands: Sequence[Command]) -> list[Command]:
        """Return what makes replicas confirm everything up to here, if that is wanted.

        They are waited for up to the connection's last write. Without one of its own, an
        answer to a question could rest on what another connection wrote and no replica has.
        """
        if not self.address.replicas or commands[0][0] not in ('EVALSHA', 'EVAL'):
            return []
        base = re.match(r'.*?:\{\d+\}', key_of(commands[0]), re.DOTALL)
        assert base is not None
        return [
            ('SET', f'{base[0]}:r', ''), ('WAIT', self.address.replicas, self.address.patience)
        ]

    def _guarded(
        self,
        call: Callable[[], list[Any]],
        *,
        changes: bool = False,
        alone: bool = True,
    ) -> tuple[list[Any], bool]:
        """Call Redis; repeat once, since a pooled connection may have been closed.

        Repeating a change is safe: a commit meets its own version, and a conditional
        write its own token.

        Args:
            alone: Whether it is one command, so that no other was carried out before an
                error came.

        Returns:
            The answer, and whether the call may have been carried out before already.

        Raises:
            StorageUnavailable: No answer came, or it was a refusal.
        """
        lost = False
        try:
            try:
                with gate:
                    return call(), lost
            except redis.exceptions.ConnectionError as exc:
                lost = changes and not (alone and nothing_done(exc))
                time.sleep(0.01)
                with gate:
                    return call(), lost
        except (*DOWN, ResponseError) as exc:
            raise self.unavailable(exc, changes, lost or (changes and not alone)) from exc

    def unavailable(
        self, exc: RedisError, changes: bool = False, lost: bool = False
    ) -> StorageUnavailable:
        """Return the error that a failure of Redis stands for.

        Args:
            changes: Whether it failed to answer something that changes.
            lost: Whether that may have been carried out all the same.
        """
        if isinstance(exc, Unconfirmed):
            how = 'did not confirm'
        else:
            how = 'refused' if isinstance(exc, ResponseError) else 'did not answer'
        text = str(exc)
        if isinstance(exc, MasterNotFoundError):
            # redis-py tells all that it knows of each Sentinel, in some thousand letters.
            text, silent, _ = text.partition(' : ')
            text += ' (not every Sentinel answers)' if silent else ''
        return StorageUnavailable(
            f'Redis at {self.address.public} {how}: {text}',
            outcome_unknown=lost or (changes and not nothing_done(exc)),
        )


def answers_of(found: list[Any]) -> list[Any]:
    """Return answers if there is no error among them.

    Raises:
        StorageUnavailable: The first error.
    """
    for one in found:
        if isinstance(one, StorageUnavailable):
            raise one
    return found


def nothing_done(exc: RedisError) -> bool:
    """Whether an error tells that the command it answers has changed nothing."""
    if isinstance(exc, ResponseError):
        return isinstance(exc, _REFUSALS) or str(exc).startswith(_REFUSAL_CODES)
    # With Sentinel, redis-py makes a lost connection of the refusal of a deposed master.
    return isinstance(exc, MasterNotFoundError) or isinstance(exc.__context__, ReadOnlyError)


def forsake(client: redis.Redis) -> None:
    """Let a client of the parent go without closing it, which would wait for its lock."""
    sentinel = getattr(client.connection_pool, 'sentinel_manager', None)
    for one in (client, *(sentinel.sentinels if sentinel else ())):
        one.auto_close_connection_pool = False


def key_of(command: Command) -> str:
    """Return the key that says to which server of several a command goes."""
    return str(command[3] if command[0] in ('EVALSHA', 'EVAL') else command[1])


def with_text(command: Command) -> Command:
    """Return a command that brings its script to a server that does not know it."""
    _, digest, *rest = command
    return ('EVAL', TEXTS[digest], *rest)


def _by_digest(call: Call) -> Command:
    name, keys, args = call
    return ('EVALSHA', _SCRIPTS[name][1], len(keys), *keys, *args)
