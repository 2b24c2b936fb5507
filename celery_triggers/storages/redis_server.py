"""A Redis server as the storage uses it: clients, scripts, and what is done when it is down."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.forks import ForkGate
from celery_triggers.storages.base import Shared, public_url

__all__ = ['Call', 'Server', 'servers']

#: What redis-py is told unless ``triggers_storage_options`` says otherwise (seconds).
#: Its own retries are off: :meth:`Server.guarded` repeats what is safe.
CLIENT_OPTIONS: dict[str, Any] = {'socket_timeout': 5.0, 'socket_connect_timeout': 2.0}

DOWN = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
)

#: A script's name, its keys and its arguments.
Call = tuple[str, Sequence[str], Sequence[str]]

#: A fork waits a little for the calls of other threads, which may hold a lock of redis-py,
#: or of an import that it makes when it first connects.
_gate = ForkGate(patience=1.0)


def _read_script(name: str) -> tuple[str, str]:
    folder = files('celery_triggers.storages') / 'lua'
    text = '\n'.join((folder / f'{part}.lua').read_text() for part in ('slice', name))
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


#: The scripts by name, each with its SHA1 digest. They are read when the module is imported,
#: since reading them imports others, in the middle of which a child could be forked.
_SCRIPTS = {name: _read_script(name) for name in ('read', 'commit', 'write', 'delete', 'take')}


class Server:
    """One server, or what stands for one behind a URL; its connections are pooled.

    Raises:
        StorageNotConfigured: The URL or the options are nothing that redis-py understands.
    """

    def __init__(self, url: str, options: dict[str, Any]):
        self.place = public_url(url)
        try:
            self.client = redis.Redis.from_url(
                url,
                decode_responses=True,
                retry=Retry(NoBackoff(), 0),
                **{**CLIENT_OPTIONS, **options},
            )
            # Made without connecting, to find out now whether it understands its options.
            pool = self.client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError) as exc:
            raise StorageNotConfigured(
                f'triggers_storage ({self.place}) or triggers_storage_options ({options}) '
                f'are nothing that redis-py understands: {exc}'
            ) from exc

    def run(self, call: Call, *, changes: bool = False) -> Any:
        """Run a script.

        Args:
            changes: Whether it changes something, so that without an answer it is unknown
                whether it did.

        Raises:
            StorageUnavailable: No answer came.
        """
        client: Any = self.client
        command: Any = client.execute_command
        try:
            return self.guarded(command, *_by_digest(call), changes=changes)
        except redis.exceptions.NoScriptError:
            name, keys, args = call
            text = _SCRIPTS[name][0]
            return self.guarded(command, 'EVAL', text, len(keys), *keys, *args, changes=changes)

    def run_many(self, calls: Sequence[Call], *, changes: bool = False) -> list[Any]:
        """Run scripts in one round trip.

        Returns:
            For each its answer, or the ``StorageUnavailable`` that asking it raised.

        Raises:
            StorageUnavailable: An answer is missing; any of them may have been run.
        """
        if len(calls) == 1:
            # No pipeline, which costs as much as a call.
            return [self.run(calls[0], changes=changes)]

        def send() -> list[Any]:
            pipeline: Any
            with self.client.pipeline(transaction=False) as pipeline:
                for call in calls:
                    pipeline.execute_command(*_by_digest(call))
                answers: list[Any] = pipeline.execute(raise_on_error=False)
                return answers

        found = self.guarded(send, changes=changes)
        return [self._answer(*pair, changes) for pair in zip(calls, found, strict=True)]

    def _answer(self, call: Call, found: Any, changes: bool) -> Any:
        if isinstance(found, redis.exceptions.NoScriptError):
            # A server that was restarted: asking alone teaches it the script.
            try:
                return self.run(call, changes=changes)
            except StorageUnavailable as exc:
                return exc
        if isinstance(found, redis.exceptions.RedisError):
            return StorageUnavailable(
                f'Redis at {self.place} refused: {found}', outcome_unknown=changes
            )
        return found

    def guarded(self, call: Callable[..., Any], *args: Any, changes: bool = False) -> Any:
        """Call Redis; repeat once, since a pooled connection may have been closed.

        Repeating a change is safe: a commit meets its own version, and a conditional
        write its own token.

        Raises:
            StorageUnavailable: No answer came, or it was a refusal.
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
        except DOWN as exc:
            raise StorageUnavailable(
                f'Redis at {self.place} did not answer: {exc}', outcome_unknown=changes
            ) from exc

    def renew_pool(self) -> None:
        """Take a new pool in a forked child.

        redis-py notices the fork too, but then waits for a lock of its pool, which a thread
        of the parent may have held.
        """
        old = self.client.connection_pool
        self.client.connection_pool = type(old)(
            connection_class=old.connection_class,
            max_connections=old.max_connections,
            **old.connection_kwargs,
        )


def _by_digest(call: Call) -> tuple[Any, ...]:
    name, keys, args = call
    return ('EVALSHA', _SCRIPTS[name][1], len(keys), *keys, *args)


#: This process's servers.
servers: Shared[Server] = Shared(Server)


def _renew_pools() -> None:
    for server in servers:
        server.renew_pool()


os.register_at_fork(after_in_child=_renew_pools)
