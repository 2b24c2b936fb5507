"""A document in a cache: nothing that was saved is lost, whoever is held up and where.

Each process is a greenlet that is left at every call of the cache; chance says who goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import greenlet
import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.cache import CacheStorageBackend
from celery_triggers.storages.cache import versions as cache_versions
from celery_triggers.storages.cache.versions import MARKED, STALE
from celery_triggers.testing.media import Medium


class FakeCache:
    """What a cache keeps, and for how long; it takes the place of a ``CacheServer``."""

    alias = 'fake'

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.values: dict[str, tuple[str, float | None]] = {}
        self.around: Callable[[Callable[[], Any]], Any] = lambda do: do()
        self.calls = 0
        self.sets = False
        self.shuffled: Callable[[list[str]], list[str]] = list

    def _do(self, do: Callable[[], Any]) -> Any:
        self.calls += 1
        self.now += 0.0002
        return self.around(do)

    def _found(self, key: str) -> str | None:
        value, until = self.values.get(key, (None, None))
        if until is not None and until <= self.now:
            del self.values[key]
            return None
        return value

    def get(self, key: str) -> str | None:
        found: str | None = self._do(lambda: self._found(key))
        return found

    def get_many(self, keys: list[str]) -> dict[str, str]:
        # Half of them, then the others: not every cache reads them at one moment.
        mixed = self.shuffled(keys)
        halves = [half for half in (mixed[len(mixed) // 2 :], mixed[: len(mixed) // 2]) if half]
        found = [self._do(lambda h=half: {key: self._found(key) for key in h}) for half in halves]
        return {key: value for half in found for key, value in half.items() if value is not None}

    def add(self, key: str, value: str, timeout: float | None) -> bool:
        def do() -> bool:
            if self._found(key) is not None:
                return False
            self._keep(key, value, timeout)
            return True

        return bool(self._do(do))

    def set(self, key: str, value: str, timeout: float | None) -> None:
        self.sets = True
        self._do(lambda: self._keep(key, value, timeout))
        self.sets = False

    def set_many(self, values: dict[str, str], timeout: float | None) -> None:
        for key, value in values.items():
            self.set(key, value, timeout)

    def _keep(self, key: str, value: str, timeout: float | None) -> None:
        self.values[key] = value, None if timeout is None else self.now + timeout


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCache:
    fake = FakeCache()
    monkeypatch.setattr(cache_versions.time, 'time', lambda: fake.now)
    monkeypatch.setattr(cache_versions.time, 'sleep', lambda _: None)
    return fake


def storage(fake: FakeCache, medium: Medium) -> CacheStorageBackend:
    backend: Any = medium.backend(application=medium.application(), local=True)
    backend._versions._cache = fake
    return backend  # type: ignore[no-any-return]


def names(text: str | None) -> list[str]:
    return text.split(',') if text else []


def fake_of(backend: Any) -> FakeCache:
    fake: FakeCache = backend._versions._cache
    return fake


def append(backend: CacheStorageBackend, mine: str) -> None:
    """Add a name to a document, as often as it takes."""
    while True:
        text, version = backend.load_document('d')
        assert mine not in names(text), 'what was not saved is not there'
        try:
            if backend.save_document('d', ','.join([*names(text), mine]), version):
                return
        except StorageUnavailable as exc:
            if not exc.outcome_unknown:
                raise
            assert fake_of(backend).now - version.read_at > STALE
            if mine in names(backend.load_document('d')[0]):
                return


class Died(BaseException):
    """The process is gone."""


class Meeting:
    """Processes that add names to one document.

    Attributes:
        acknowledged: The names that were certainly added.
    """

    def __init__(self, seed: int, fake: FakeCache, medium: Medium):
        self.random = random.Random(seed)
        self.fake = fake
        self.medium = medium
        self.acknowledged: set[str] = set()
        self.hub = greenlet.getcurrent()
        self.went_on: dict[Any, float] = {}
        fake.values.clear()
        fake.around = self._around
        fake.shuffled = lambda keys: self.random.sample(keys, len(keys))

    def _around(self, do: Callable[[], Any]) -> Any:
        if greenlet.getcurrent() is self.hub:
            return do()
        self.hub.switch()
        answer = do()
        self.hub.switch()
        return answer

    def _live(self, process: int) -> None:
        backend = storage(self.fake, self.medium)
        with suppress(Died):
            for number in range(4):
                append(backend, f'{process}.{number}')
                self.acknowledged.add(f'{process}.{number}')

    def run(self, *, longest_pause: float, deaths: float) -> list[str]:
        """Let them live; return what is there then."""
        living = {greenlet.greenlet(self._live): number for number in range(4)}
        for one, number in living.items():
            self._go_on(one, number)
        while living:
            # One is held up, while the others go far.
            held = self.random.choice(list(living)) if self.random.random() < 0.3 else None
            for _ in range(self.random.randint(1, 40)):
                others = [one for one in living if one is not held and not one.dead]
                if others:
                    chosen = self.random.choice(others)
                    if self.random.random() < deaths:
                        chosen.throw(Died)
                    else:
                        self._go_on(chosen)
            living = {one: number for one, number in living.items() if not one.dead}
            self._pass_time(living, longest_pause)
        backend = storage(self.fake, self.medium)
        kept = names(backend.load_document('d')[0])
        # Nobody saves it again before the marks have gone.
        self.fake.now += 3 * MARKED
        assert names(backend.load_document('d')[0]) == kept
        return kept

    def _go_on(self, process: Any, *args: Any) -> None:
        self.went_on[process] = self.fake.now
        process.switch(*args)

    def _pass_time(self, living: Iterable[Any], longest_pause: float) -> None:
        self.fake.now += self.random.uniform(0, longest_pause)
        for one in living:
            # Nobody is held up for as long as the marks stay.
            if self.fake.now - self.went_on[one] > STALE - longest_pause:
                self._go_on(one)


@pytest.mark.parametrize('deaths', [0.0, 0.01])
@pytest.mark.parametrize('longest_pause', [0.0, MARKED / 10], ids=['no time', 'minutes'])
def test_nothing_that_was_saved_is_lost(
    fake: FakeCache, local_medium: Medium, longest_pause: float, deaths: float
):
    for seed in range(300):
        meeting = Meeting(seed, fake, local_medium)
        kept = meeting.run(longest_pause=longest_pause, deaths=deaths)
        assert len(kept) == len(set(kept))
        assert meeting.acknowledged <= set(kept), seed
        assert deaths or meeting.acknowledged == set(kept)


@pytest.mark.parametrize('changes', [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize('pause', [0, MARKED - 1, MARKED + 1, 10 * MARKED])
def test_a_writer_that_was_held_up_is_refused(
    fake: FakeCache, local_medium: Medium, changes: int, pause: float
):
    """After any number of changes by others, and when their marks have gone."""
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    text, version = early.load_document('d')
    for number in range(changes):
        append(other, str(number))
    fake.now += pause
    if pause > MARKED:
        append(other, 'last')
    before = other.load_document('d')[0]
    assert not early.save_document('d', f'{text},early', version)
    assert other.load_document('d')[0] == before
    append(early, 'early')
    assert names(other.load_document('d')[0]) == [*names(before), 'early']


def test_a_writer_that_was_held_up_does_not_bring_back_what_was_removed(
    fake: FakeCache, local_medium: Medium
):
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    _, version = early.load_document('d')
    assert other.save_document('d', None, other.load_document('d')[1])
    assert not early.save_document('d', 'early', version)
    fake.now += 10 * MARKED
    assert not early.save_document('d', 'early', version)
    assert other.load_document('d')[0] is None
    assert [key for key in list(fake.values) if fake._found(key)] == [], 'nothing stays'


def test_a_writer_that_was_held_up_while_it_adds_does_not_bring_back_what_was_removed(
    fake: FakeCache, local_medium: Medium
):
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    _, version = early.load_document('d')

    def remove() -> None:
        assert other.save_document('d', None, other.load_document('d')[1])
        fake.now += 2 * MARKED

    hold_at(0, fake, 'before', remove)
    assert not early.save_document('d', 'early', version)
    assert other.load_document('d')[0] is None


@pytest.mark.parametrize('when', range(12))
def test_the_next_process_goes_on_where_one_has_died(
    fake: FakeCache, local_medium: Medium, when: int
):
    """Between any two calls of a change, of which the pointer may then know nothing."""
    backend = storage(fake, local_medium)
    append(backend, 'first')
    append(backend, 'second')
    first = fake.calls

    def around(do: Callable[[], Any]) -> Any:
        answer = do()
        if fake.calls == first + when + 1:
            raise Died
        return answer

    fake.around = around
    for dead in range(30):
        with suppress(Died):
            append(storage(fake, local_medium), f'dead {dead}')
        first = fake.calls
    fake.around = lambda do: do()
    found = names(backend.load_document('d')[0])
    append(backend, 'last')
    assert names(backend.load_document('d')[0]) == [*found, 'last']
    values = [value for value, _ in fake.values.values() if 'first' in value]
    assert len(values) <= 2, 'old versions do not stay'


class Others:
    """Another process, which adds names while nothing happens to it."""

    def __init__(self, fake: FakeCache, medium: Medium):
        self.fake = fake
        self.backend = storage(fake, medium)
        self.names: list[str] = []

    def add(self, changes: int, pause: float = 0) -> None:
        for number in range(changes):
            self.names.append(f'other {len(self.names)}')
            append(self.backend, self.names[-1])
            if number == changes // 2:
                self.fake.now += pause
        self.fake.now += pause

    def die(self) -> None:
        """Add a version of which the pointer does not know."""

        def around(do: Callable[[], Any]) -> Any:
            before = len(self.fake.values)
            answer = do()
            if len(self.fake.values) > before:
                raise Died
            return answer

        self.fake.around = around
        self.names.append('dead')
        with suppress(Died):
            append(self.backend, 'dead')
        self.fake.around = lambda do: do()


def hold_at(number: int, fake: FakeCache, when: str, hold: Callable[[], Any]) -> int:
    """Call ``hold`` before or after the call of this number; return its number of all."""
    last = fake.calls + number + 1

    def around(do: Callable[[], Any]) -> Any:
        if fake.calls != last or (when == 'before, unless it sets' and fake.sets):
            return do()
        fake.around = lambda do: do()
        if when != 'after':
            hold()
        answer = do()
        if when == 'after':
            hold()
        return answer

    fake.around = around
    return last


@pytest.mark.parametrize('changes', [0, 1, 2, 200])
@pytest.mark.parametrize(
    ('pause', 'when'),
    [
        (0.0, 'before'),
        (0.4 * MARKED, 'before'),
        (0.4 * MARKED, 'after'),
        (2.0 * MARKED, 'after'),
        (2.0 * MARKED, 'before, unless it sets'),
    ],
)
@pytest.mark.parametrize('lags', [False, True])
def test_a_process_is_held_up_at_any_call(
    fake: FakeCache, local_medium: Medium, pause: float, when: str, changes: int, lags: bool
):
    """While others go on, and then nobody does for hours.

    Whoever is held up for longer than there are marks, and that between looking at the clock
    and setting the pointer, may lose what others have changed.
    """
    for number in range(30):
        fake.values.clear()
        backend, others = storage(fake, local_medium), Others(fake, local_medium)
        others.add(1 if lags else 3)
        if lags:
            others.die()
        was_held = hold_at(number, fake, when, lambda o=others: o.add(changes, pause))
        append(backend, 'mine')
        fake.around = lambda do: do()
        everything = sorted(['mine', *others.names])
        assert sorted(names(backend.load_document('d')[0])) == everything, number
        fake.now += 3 * MARKED
        assert sorted(names(backend.load_document('d')[0])) == everything, number
        if fake.calls < was_held:
            assert number > 5
            return
    raise AssertionError('more calls than were looked at')


def test_a_reader_that_was_held_up_reads_what_is_there_now(
    fake: FakeCache, local_medium: Medium
):
    """Also where neither the versions that it looks for are left nor marks of them."""
    backend, others = storage(fake, local_medium), Others(fake, local_medium)
    others.add(2)
    hold_at(0, fake, 'after', lambda: others.add(200, 2 * MARKED))
    assert names(backend.load_document('d')[0]) == others.names


def test_a_mark_that_was_evicted_lets_no_late_writer_through(
    fake: FakeCache, local_medium: Medium
):
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    append(other, 'second')
    _, version = early.load_document('d')
    append(other, 'third')
    append(other, 'fourth')
    for key in [key for key, (value, _) in fake.values.items() if value == '-']:
        del fake.values[key]
    assert not early.save_document('d', 'early', version)
    assert names(other.load_document('d')[0]) == ['first', 'second', 'third', 'fourth']
    assert not [value for value, _ in fake.values.values() if 'early' in value]


def test_after_the_eviction_of_a_pointer_another_chain_begins(
    fake: FakeCache, local_medium: Medium
):
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    append(other, 'second')
    _, version = early.load_document('d')
    del fake.values[early._versions.pointer('d')]
    assert other.load_document('d') == (None, None)
    append(other, 'new')
    assert not early.save_document('d', 'first,second,early', version)
    assert other.load_document('d')[0] == 'new'


def test_after_the_eviction_of_a_version_the_document_begins_again(
    fake: FakeCache, local_medium: Medium
):
    backend = storage(fake, local_medium)
    for name in ('first', 'second', 'third'):
        append(backend, name)
    newest = next(key for key, (value, _) in fake.values.items() if 'third' in value)
    del fake.values[newest]
    assert backend.load_document('d')[0] is None
    append(backend, 'new')
    assert backend.load_document('d')[0] == 'new'


def test_a_client_that_repeats_an_add_is_believed(fake: FakeCache, local_medium: Medium):
    backend = storage(fake, local_medium)
    real = fake.add
    fake.add = lambda *args: bool(real(*args) and False)  # type: ignore[method-assign]
    assert backend.save_document('d', 'first', None)
    assert backend.save_document('d', 'second', backend.load_document('d')[1])
    assert backend.load_document('d')[0] == 'second'


def test_a_cache_that_neither_keeps_nor_complains_is_unavailable(
    fake: FakeCache, local_medium: Medium
):
    backend = storage(fake, local_medium)
    fake.add = lambda *_: False  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable, match='does not keep'):
        append(backend, 'first')


def test_a_document_keeps_its_timeout(fake: FakeCache, local_medium: Medium):
    """Whoever changes it; the index has none."""
    application = local_medium.application()
    long: Any = local_medium.backend('order:1', application, local=True, timeout=7200)
    other: Any = local_medium.backend('order:2', application, local=True, timeout=5)
    for backend in (long, other):
        backend._versions._cache = fake
    name = long._index.session('order:1')
    assert long.save_document(name, 'a', None)
    assert other.save_document(name, 'b', other.load_document(name)[1])
    assert other.save_document('index', 'i', None)
    fake.now += 7199
    assert other.save_document(name, 'c', other.load_document(name)[1])
    fake.now += 7199
    assert other.load_document(name)[0] == 'c'
    fake.now += 2
    assert other.load_document(name)[0] is None
    assert other.load_document('index')[0] == 'i'


@pytest.mark.parametrize('call', range(9))
def test_what_begins_again_while_it_is_removed_is_there_for_good(
    fake: FakeCache, local_medium: Medium, call: int
):
    """What remains of a removal goes after an hour, but not what came after it."""
    early, other = storage(fake, local_medium), storage(fake, local_medium)
    append(other, 'first')
    _, version = early.load_document('d')
    begun: list[int] = []

    def begin() -> None:
        append(other, 'new')
        begun.append(call)

    hold_at(call, fake, 'before', begin)
    early.save_document('d', None, version)
    fake.around = lambda do: do()
    before = names(other.load_document('d')[0])
    fake.now += 3 * MARKED
    assert names(other.load_document('d')[0]) == before
    assert ('new' in before) == bool(begun)
    assert begun or call > 5


def test_a_pointer_that_lags_is_set_by_whoever_reads_it(fake: FakeCache, local_medium: Medium):
    backend = storage(fake, local_medium)
    append(backend, '0')
    append(backend, '1')
    pointer = backend._versions.pointer('d')
    lags = fake.values[pointer]
    for number in range(2, 200):
        append(backend, str(number))
    # As a process leaves it that was held up for so long and is gone.
    fake.values[pointer] = lags
    assert len(names(backend.load_document('d')[0])) == 200
    for key in [key for key, (value, _) in fake.values.items() if value == '-']:
        del fake.values[key]
    fake.now += 3 * MARKED
    assert len(names(backend.load_document('d')[0])) == 200
    append(backend, 'last')
    assert names(backend.load_document('d')[0])[-1] == 'last'


@pytest.mark.parametrize('timeout', [None, 30 * 24 * MARKED])
def test_old_marks_go_long_before_their_document(
    fake: FakeCache, local_medium: Medium, timeout: float | None
):
    fake_of(storage(fake, local_medium))
    backend: Any = local_medium.backend(
        application=local_medium.application(), local=True, timeout=timeout
    )
    backend._versions._cache = fake
    name = backend._index.session(backend.uid)
    for number in range(1000):
        _, version = backend.load_document(name)
        assert backend.save_document(name, f'{number}', version)
    fake.now += MARKED + 1
    left = [key for key in list(fake.values) if fake._found(key)]
    assert len(left) < 2 * cache_versions.BATCH + 5
