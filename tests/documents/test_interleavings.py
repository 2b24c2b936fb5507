"""Processes that meet between any two calls of the medium, and die there: nothing is missing.

Each process is a greenlet that is left at every call; chance says who goes on. After every
change of the medium the index is compared with the sessions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import greenlet
import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.document import index as document_index
from celery_triggers.storages.document.document import StoredDocument
from celery_triggers.storages.records import Request, StorageTime, Write
from celery_triggers.testing.conformance.test_contract import commit, row
from celery_triggers.testing.media import Medium
from tests.documents.shelf import Died, Shelf, index_of, missing_entries, superfluous_dates
from tests.documents.test_costs import sweep

UIDS = ('s:1', 's:2')
NAMES = ('t_a#0', 't_b#0', '')
TASK_IDS = ('task-1', 'task-2')

WHOLE = Request(whole=True)


class Processes:
    """Some processes over one shelf."""

    def __init__(self, shelf: Shelf, medium: Medium, seed: int):
        self.shelf = shelf
        self.medium = medium
        self.random = random.Random(seed)
        self.application = medium.application()
        self.kept: dict[str, set[str]] = {uid: set() for uid in UIDS}
        self.ever: set[str] = set()
        self.sweeping: set[Any] = set()
        shelf.at = 1_000
        shelf.around = self._around
        self.hub = greenlet.getcurrent()

    def run(self, count: int) -> None:
        """Let so many processes live until each has ended or died."""
        living = [greenlet.greenlet(self._live) for _ in range(count)]
        while living:
            process = self.random.choice(living)
            if process and self.random.random() < 0.02:
                process.throw(Died)
            else:
                process.switch()
            self.shelf.at = (self.shelf.at or 0) + self.random.choice([0, 0, 1, 20])
            living = [one for one in living if not one.dead]

    def _around(self, do: Callable[[], Any]) -> Any:
        if greenlet.getcurrent() is self.hub:
            return do()
        self.hub.switch()
        # A sweep that cannot save a session puts off its date: that is tested elsewhere.
        fails = self.random.random() if greenlet.getcurrent() not in self.sweeping else 1
        if fails < 0.01:
            raise StorageUnavailable('before it was done')
        answer = do()
        self._check()
        if fails < 0.02:
            raise StorageUnavailable('after it was done')
        self.hub.switch()
        return answer

    def _check(self) -> None:
        assert missing_entries(index_of(self.shelf), UIDS) == []
        for uid in UIDS:
            text = self.shelf.documents.get(f'triggers:s:{uid}')
            entries = set(StoredDocument.from_text(text).entries) if text else set()
            assert not entries or entries >= self.kept[uid], 'nothing goes but with the session'
            self.kept[uid] = entries
            self.ever |= entries

    def _live(self) -> None:
        try:
            for _ in range(self.random.randint(1, 6)):
                act = self.random.choice(
                    [self._commit, self._commit, self._commit, self._write, self._delete,
                     self._sweep]
                )
                with suppress(StorageUnavailable):
                    act(self.random.choice(UIDS))
        except Died:
            pass

    def _commit(self, uid: str) -> None:
        backend = self.medium.backend(uid, self.application)
        found = backend._read(WHOLE)
        mine = f'{self.random.getrandbits(40):x}'
        names = self.random.sample(NAMES, self.random.randint(0, 3))
        parts: dict[str, Any] = {
            'puts': {f'e:{mine}': '1'},
            'dues': {
                name: self.random.choice([0, (self.shelf.at or 0) + self.random.randint(-50, 300)])
                for name in names
            },
            'gates': {
                task_id: self.random.choice(['', 't_a#0'])
                for task_id in self.random.sample(TASK_IDS, self.random.randint(0, 2))
            },
        }
        if 't_a#0' not in found.rows:
            parts['rows'] = {'t_a#0': row()}
        change = commit(found.version, f'v{mine}', **parts)
        change.configuration = ('d', '{}') if not found.version else None
        if backend._commit(change, WHOLE) is None:
            assert f'e:{mine}' in self.ever

    def _write(self, uid: str) -> None:
        due = self.random.choice([0, None, 5, StorageTime(self.random.randint(0, 200))])
        write = Write('t_a#0', 'i1', [{}], {'lease': StorageTime(5)}, due=due)
        self.medium.backend(uid, self.application)._write(write)

    def _delete(self, uid: str) -> None:
        self.medium.backend(uid, self.application)._delete()

    def _sweep(self, _: str) -> None:
        self.sweeping.add(greenlet.getcurrent())
        sweep(self.medium)
        self.sweeping.discard(greenlet.getcurrent())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses take no time, since nobody else can go on meanwhile."""
    monkeypatch.setattr(document_index.time, 'sleep', lambda _: None)
    return None


@pytest.mark.usefixtures('hasty')
@pytest.mark.parametrize('some', range(8))
def test_nothing_is_missing_from_the_index_at_any_moment(
    some: int, shelf: Shelf, shelf_medium: Medium
):
    for seed in range(some * 100, some * 100 + 100):
        shelf.documents.clear()
        processes = Processes(shelf, shelf_medium, seed)
        processes.run(5)
        shelf.around = lambda do: do()
        # What was left by the dead goes when it falls due, or with what is put beside it.
        shelf.at = 10**6
        for _ in range(3):
            while sweep(shelf_medium).more:
                pass
            shelf.at += 10**6
        assert missing_entries(index_of(shelf), UIDS) == []
        assert superfluous_dates(index_of(shelf), shelf.at) == []
