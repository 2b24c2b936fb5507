"""What is lost with any single key that a cache evicts: no more than its page says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.core.cache.backends import locmem

from celery_triggers.exceptions import TriggersError
from celery_triggers.storages import base
from celery_triggers.storages.cache import CacheStorageBackend
from celery_triggers.sweep import Sweep
from celery_triggers.testing.media import Medium
from tests.documents.shelf import missing_entries

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_late': {'after': ['never'], 'within': 3600, 'run': 'x'},
}
UID = 'order:1'


class World:
    """A session in a cache whose keys can be listed."""

    def __init__(self, medium: Medium, monkeypatch: pytest.MonkeyPatch):
        self.medium = medium
        self.now = 10**12
        monkeypatch.setattr(CacheStorageBackend, 'now', lambda _: self.now)
        self.application = medium.application(TASKS)
        self.manager = medium.manager(self.application, UID)
        self.manager.fire('a')
        self.manager.fire('nothing')
        self.manager.update_configuration({'t_own': {'after': ['own'], 'run': 'x'}})
        self.manager.fire('nothing')
        self.sweep()
        self.kept = dict(self.cache())
        self.expiry = dict(self.expiries())
        self.names = {self._pointer(name): name for name in self._document_names()}

    def cache(self) -> dict[str, Any]:
        found: dict[str, Any] = locmem._caches['triggers']  # type: ignore[attr-defined]
        return found

    def expiries(self) -> dict[str, Any]:
        found: dict[str, Any] = locmem._expire_info['triggers']  # type: ignore[attr-defined]
        return found

    def _pointer(self, name: str) -> str:
        key: str = self.manager.storage._versions.pointer(name)  # type: ignore[attr-defined]
        return key

    def _document_names(self) -> Iterator[str]:
        index = self.manager.storage._index  # type: ignore[attr-defined]
        yield from (index.session(UID), index.sweeps, *index.due_shards, *index.uid_shards)
        yield index.configuration(self.manager.storage.load().head.digest)
        yield index.configuration(self.application.configuration.digest)

    def kinds(self) -> list[tuple[str, str]]:
        """Return each key of the cache with the kind of its document and of its own."""
        found = []
        for key in self.kept:
            if self.medium.prefix in key:
                _, _, pointer, digest, *version = key.split(':')
                name = self.names[f'{pointer}:{digest}']
                found.append((key, f'{name.split(":")[1]} {"version" if version else "pointer"}'))
        return found

    def evict(self, key: str) -> None:
        for now, then in ((self.cache(), self.kept), (self.expiries(), self.expiry)):
            now.clear()
            now.update(then)
            del now[key]
        # Another process, which knows nothing.
        base._CONFIGURATIONS.clear()

    def sweep(self) -> Any:
        kind = self.medium.storage_class
        return Sweep(self.application, kind, self.medium.url).run()

    @property
    def missing(self) -> list[str]:
        index = self.manager.storage._index  # type: ignore[attr-defined]
        found: list[str] = missing_entries(index, [UID])
        return found


@pytest.fixture
def world(local_medium: Medium, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(local_medium, monkeypatch)


def gone(world: World) -> None:
    """The session is gone, and another may begin."""
    storage = world.manager.storage
    assert not storage.exists
    assert world.medium.uids() == []
    world.now += 10**8
    world.sweep()
    world.manager.fire('b')
    assert [record.trigger for record in storage.history] == ['b']
    assert world.missing == []


def unharmed(world: World) -> None:
    assert world.missing == []
    assert world.medium.uids() == [UID]
    assert world.manager.fire('b').released == ['t_join#0']
    assert world.missing == []


def date_forgotten(world: World) -> None:
    """What is due is found again as soon as the session changes after that."""
    assert [what for what in world.missing if 'is due' in what]
    assert world.manager.storage['t_late#0'].status == 'unstarted'
    world.now += 3_700_000
    world.manager.fire('nothing')
    assert world.missing == []
    assert world.sweep().expired == 1


def not_listed(world: World) -> None:
    """Only the listing misses it."""
    assert world.medium.uids() == []
    assert world.manager.fire('b').released == ['t_join#0']
    world.now += 3_700_000
    assert world.sweep().expired == 1


def without_configuration(world: World) -> None:
    """A session with one of its own cannot go on in processes that do not know it."""
    with pytest.raises(TriggersError, match='has lost data'):
        world.manager.fire('b')


def not_calm(world: World) -> None:
    """Those who should have renewed something are given the time to."""
    world.now += 3_700_000
    report = world.sweep()
    assert report.expired == 1


LOST = {
    's': gone,
    'd': date_forgotten,
    'u': not_listed,
    'c': without_configuration,
    'z': not_calm,
}


def test_every_key_is_evicted_in_turn(world: World):
    seen = set()
    last = {}
    for key, kind in world.kinds():
        if 'version' in kind:
            chain, _, number = key.rpartition(':')
            last[chain] = max(last.get(chain, 0), int(number))
    for key, kind in world.kinds():
        chain, _, number = key.rpartition(':')
        mark = 'version' in kind and int(number) < last[chain]
        what = f'{kind.split()[0]} mark' if mark else kind
        world.evict(key)
        own = world.manager.storage._index.configuration(  # type: ignore[attr-defined]
            world.application.configuration.digest
        )
        world.now = 10**12
        if mark or key.endswith(world._pointer(own)):
            unharmed(world)
        else:
            LOST[kind[0]](world)
        seen.add(what)
    assert seen >= {
        's pointer', 's version', 's mark', 'd pointer', 'u pointer', 'c pointer', 'z pointer',
    }, seen
