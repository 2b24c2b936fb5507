"""The simulated storage: the memory storage with a network in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.settings import Settings
from celery_triggers.storages.document.document import Document
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.storages.records import Commit, Request, Row, Slice, Taken, Write
from tests.simulation.ledger import Ledger
from tests.simulation.world import World

T = TypeVar('T')

URL = 'memory://simulation'

#: A session that nobody can read.
POISON = 's:poison'


class SimulatedStorageBackend(MemoryStorageBackend):
    """Keeps sessions in memory; everything on the way there and back can go wrong.

    The ledger sees each change of a row as it happens, whoever made it.
    """

    world: ClassVar[World]
    ledger: ClassVar[Ledger]
    down_until: ClassVar[int] = 0

    @classmethod
    def begin(cls, world: World, ledger: Ledger) -> None:
        """Forget everything and serve another world."""
        cls.clear(URL)
        cls.world, cls.ledger, cls.down_until = world, ledger, 0

    @classmethod
    def poison(cls, count: int) -> None:
        """Store a session that cannot be read, of which so much is due for ever."""
        space = cls.space()
        space.documents[POISON] = Document('v', 'i', head='{')
        for number in range(count):
            space.agenda.set(POISON, f't_0#{number}', 1)

    @classmethod
    def space(cls) -> Any:
        """Return what is stored, past the network."""
        return cls._space_at(URL, 'triggers')

    # ---------------------------------------------------------------- the medium

    def _read(self, request: Request) -> Slice:
        return self._ask(lambda: MemoryStorageBackend._read(self, request))

    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        return self._ask(lambda: self._commit_seen(commit, request), changes=True)

    def _write(self, write: Write) -> tuple[bool, Row | None]:
        return self._ask(lambda: self._write_seen(write), changes=True)

    def _delete(self, version: str | None = None) -> bool:
        return self._ask(lambda: self._delete_seen(version), changes=True)

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        def take() -> Taken:
            before = {(uid, name): at for uid, name, at in cls._dates(settings)}
            taken = MemoryStorageBackend.take_due.__func__(  # type: ignore[attr-defined]
                cls, url, settings, limit=limit, push=push, gap=gap
            )
            cls.ledger.taken(taken, before)
            return taken

        return cls._ask(take, changes=True)

    @classmethod
    def _dates(cls, settings: Settings) -> Iterator[tuple[str, str, int]]:
        return MemoryStorageBackend.due_dates.__func__(  # type: ignore[attr-defined]
            cls, URL, settings
        )

    # ----------------------------------------------------------- what is noticed

    def _commit_seen(self, commit: Commit, request: Request) -> Slice | None:
        document = self._document()
        before = {name: document.rows.get(name) for name in commit.rows}
        answer = MemoryStorageBackend._commit(self, commit, request)
        if answer is None:
            self.ledger.committed(self, commit, before)
        return answer

    def _write_seen(self, write: Write) -> tuple[bool, Row | None]:
        before = self._document().rows.get(write.name)
        applied, row = MemoryStorageBackend._write(self, write)
        if applied:
            assert before is not None
            assert row is not None
            self.ledger.written(self, write, before, row)
        return applied, row

    def _delete_seen(self, version: str | None) -> bool:
        document = self._document()
        deleted = MemoryStorageBackend._delete(self, version)
        if deleted:
            self.ledger.deleted(self, document, by_sweep=version is not None)
        return deleted

    # --------------------------------------------------------------- the network

    @classmethod
    def _ask(cls, do: Callable[[], T], *, changes: bool = False) -> T:
        """Do something at the medium, if what lies between lets it through."""
        world = cls.world
        world.point()
        if world.current is None:
            return do()
        kind = world.strikes('storage error', 'answer lost', 'storage repeats', 'outage')
        if kind == 'outage':
            cls.down_until = world.now + int(world.lease * world.pick(0.3, 0.8, 1.2, 3))
            world.disturbed.append(cls.down_until)
        if cls.down_until > world.now and not world.healed:
            world.sleep(0.02)
            raise StorageUnavailable('the storage is down', outcome_unknown=changes)
        if kind is not None and cls.ledger.actor.kind == 'beat':
            world.disturbed.append(world.now)
        if kind == 'storage error':
            # Not applied, but nobody can tell.
            raise StorageUnavailable('no connection', outcome_unknown=changes)
        answer = do()
        if kind == 'storage repeats':
            # A client that got no answer asks again.
            world.point()
            answer = do()
        world.point()
        if kind == 'answer lost':
            raise StorageUnavailable('the answer was lost', outcome_unknown=changes)
        return answer
