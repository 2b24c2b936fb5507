"""A Redis cluster as the storage uses it, and what there is at a URL.

All keys of a session share a slot, and there are as many slots as shards. So what redis-py's
own cluster client is good for is little here: it guesses the keys of scripts by asking the
server, repeats what timed out, and tells nobody whether a change was sent. Its client of one
node is what this one is made of.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.forks import ForkLock
from celery_triggers.storages.base import Shared
from celery_triggers.storages.redis.address import Address, Host
from celery_triggers.storages.redis.server import (
    DOWN,
    Command,
    Server,
    forsake,
    gate,
    key_of,
    with_text,
)

__all__ = ['Cluster', 'servers']

#: How long to wait, time after time (seconds), while a slot is on its way to another node or
#: a node takes another's place. What a node redirects is sent to the other at once.
PAUSES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)

MOST_ROUNDS = 16

_REFUSALS: dict[str, Any] = {
    'ASK': AskError,
    'CLUSTERDOWN': ClusterDownError,
    'MASTERDOWN': MasterDownError,
    'MOVED': MovedError,
    'TRYAGAIN': TryAgainError,
}


@dataclass(slots=True)
class _Asked:
    """A command on its way.

    Attributes:
        answer: What came of it; an error is a ``StorageUnavailable``.
        refusal: What the last node that was asked said instead of answering.
        asking: Who has its keys while their slot is on its way.
        failures: How many connections broke before it was answered.
        lost: Whether it may have been carried out already.
    """

    command: Command
    slot: int
    answer: Any = None
    done: bool = False
    refusal: RedisError | None = None
    asking: Host | None = None
    failures: int = 0
    lost: bool = False

    @property
    def must_wait(self) -> bool:
        return isinstance(self.refusal, (TryAgainError, ClusterDownError))

    def finish(self, answer: Any) -> None:
        self.answer, self.done = answer, True


class Cluster(Server):
    """A cluster, found by some of its nodes."""

    def __init__(self, address: Address):
        self.address = address
        self._clients: dict[Host, redis.Redis] = {}
        #: By slot. Replaced whole when the nodes are asked; a redirection changes one entry.
        self._owners: dict[int, Host] = {}
        #: Whoever did not answer; others are asked first who owns what.
        self._doubtful: set[Host] = set()
        self._lock = ForkLock()

    def keys(self, pattern: str) -> list[str]:
        self._find_owners(self._owners)
        hosts = dict.fromkeys(self._owners.values())
        return [key for host in hosts for key in self._keys_at(self._client(host), pattern)]

    def renew(self) -> None:
        for client in self._clients.values():
            forsake(client)
        self._clients = {}

    # ---------------------------------------------------------------- sending

    def _send(self, commands: Sequence[Command], changes: bool) -> list[Any]:
        asked = [_Asked(command, key_slot(key_of(command).encode())) for command in commands]
        pauses = iter(PAUSES)
        for _ in range(MOST_ROUNDS):
            left = [one for one in asked if not one.done]
            pause = next(pauses, None) if any(one.must_wait for one in left) else 0.0
            if not left or pause is None:
                break
            if pause:
                time.sleep(pause)
            try:
                groups = self._groups(left)
            except StorageUnavailable as exc:
                return [
                    one.answer if one.done
                    else StorageUnavailable(str(exc), outcome_unknown=one.lost)
                    for one in asked
                ]
            for (host, asking), group in groups.items():
                self._send_to(host, asking, group, changes)
        return [one.answer if one.done else self._given_up(one) for one in asked]

    def _groups(self, left: Sequence[_Asked]) -> dict[tuple[Host, bool], list[_Asked]]:
        """Return who is to be sent what, and whether it has to be asked for."""
        owners = self._owners
        if self._doubtful or not all(one.slot in owners for one in left):
            self._find_owners(owners)
        groups: dict[tuple[Host, bool], list[_Asked]] = {}
        for one in left:
            host = one.asking or self._owners.get(one.slot)
            if host is None:
                one.refusal = ClusterDownError(f'no node has slot {one.slot}')
            else:
                groups.setdefault((host, one.asking is not None), []).append(one)
        return groups

    def _send_to(
        self, host: Host, asking: bool, group: Sequence[_Asked], changes: bool
    ) -> None:
        commands = [one.command for one in group]
        try:
            with gate:
                found = self._exchange(self._client(host), commands, asking)
        except DOWN as exc:
            self._doubtful.add(host)
            # As with one server, only a broken connection is worth another attempt.
            broken = isinstance(exc, redis.exceptions.ConnectionError)
            for one in group:
                one.asking, one.lost = None, one.lost or changes
                one.failures += 1
                if one.failures > 1 or not broken:
                    one.finish(self.unavailable(exc, changes, one.lost))
        else:
            for one, answer in zip(group, found, strict=True):
                self._take(one, _typed(answer), host, changes)

    def _take(self, one: _Asked, answer: Any, host: Host, changes: bool) -> None:
        """See what a node answered to a command."""
        if isinstance(answer, NoScriptError):
            one.command = with_text(one.command)
            return
        one.asking = None
        if isinstance(answer, AskError):
            # Where it says no host, it means itself under another port.
            other = (answer.host or host[0], answer.port)
            if isinstance(answer, MovedError):
                self._owners[one.slot] = other
            else:
                one.asking = other
            one.refusal = answer
        elif isinstance(answer, (TryAgainError, ClusterDownError)):
            if isinstance(answer, ClusterDownError):
                self._doubtful.add(host)
            one.refusal = answer
        elif isinstance(answer, RedisError):
            one.finish(self.unavailable(answer, changes, one.lost))
        else:
            one.finish(answer)

    def _given_up(self, one: _Asked) -> StorageUnavailable:
        return self.unavailable(one.refusal or ClusterDownError('no answer'), lost=one.lost)

    # ------------------------------------------------------------------ nodes

    def _client(self, host: Host) -> Any:
        # setdefault is atomic: two threads get the same client.
        return self._clients.get(host) or self._clients.setdefault(host, self.address.node(host))

    def _find_owners(self, seen: Mapping[int, Host]) -> None:
        """Ask the nodes who has which slot, unless somebody just did.

        Raises:
            StorageUnavailable: None of them answered.
            StorageNotConfigured: The one that did is no node of a cluster.
        """
        with self._lock:
            if self._owners is not seen:
                return
            hosts = list(dict.fromkeys([*self._owners.values(), *self.address.hosts]))
            # A node that is cut off from the others tells what was true long ago.
            random.shuffle(hosts)
            error: RedisError = ClusterDownError('no node has any slot')
            for host in sorted(hosts, key=lambda host: host in self._doubtful):
                try:
                    with gate:
                        ranges = self._client(host).execute_command('CLUSTER SLOTS')
                except (*DOWN, ResponseError) as exc:
                    _check_is_cluster(exc, self.address)
                    error = exc
                    continue
                if ranges:
                    self._set_owners(ranges, host)
                    return
            raise self.unavailable(error)

    def _set_owners(self, ranges: Sequence[Any], asked: Host) -> None:
        self._owners = {
            slot: (owner[0] or asked[0], int(owner[1]))
            for first, last, owner, *_ in ranges
            for slot in range(int(first), int(last) + 1)
        }
        self._doubtful = set()
        kept = {*self._owners.values(), *self.address.hosts}
        for host in self._clients.keys() - kept:
            self._clients.pop(host, None)


def _typed(answer: Any) -> Any:
    """Return what a node said; redis-py before 6 types a cluster's refusals nowhere else."""
    if type(answer) is ResponseError:
        code, _, rest = str(answer).partition(' ')
        return _REFUSALS[code](rest) if code in _REFUSALS else answer
    return answer


def _check_is_cluster(exc: RedisError, address: Address) -> None:
    if isinstance(exc, ResponseError) and 'cluster support disabled' in str(exc):
        raise StorageNotConfigured(
            f'there is no cluster at {address.public}; the URL of one server is redis://'
        ) from exc


def _server(url: str, options: Mapping[str, Any]) -> Server:
    address = Address.of(url, options)
    return Cluster(address) if address.kind == 'cluster' else Server(address)


#: This process's servers.
servers: Shared[Server] = Shared(_server)
