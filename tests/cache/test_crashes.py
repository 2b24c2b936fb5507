"""The process dies before or after any call of a real cache; the next one goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.storages.cache import CacheStorageBackend
from celery_triggers.storages.cache.server import CacheServer
from celery_triggers.testing.media import Medium
from tests.documents.shelf import Died
from tests.documents.story import TASKS, Story


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, fatal: int, done: bool, error: type[BaseException]
) -> Iterator[Callable[[], int]]:
    """Raise an error at the call of this number, before or after it is made."""
    real: Any = CacheServer._call
    counter = itertools.count()

    def call(self: CacheServer, *args: Any) -> Any:
        number = next(counter)
        if number == fatal and not done:
            raise error('at this call')
        answer = real(self, *args)
        if number == fatal:
            raise error('at this call')
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(CacheServer, '_call', call)
        yield lambda: next(counter)


@pytest.mark.parametrize('done', [False, True], ids=['before', 'after'])
def test_the_process_dies_at_any_call(
    local_medium: Medium, monkeypatch: pytest.MonkeyPatch, done: bool
):
    die_at_any_call(local_medium, monkeypatch, done, 1)


@pytest.mark.parametrize('done', [False, True], ids=['before', 'after'])
def test_the_process_dies_at_some_calls_of_a_server(
    cache_medium: Medium, monkeypatch: pytest.MonkeyPatch, done: bool
):
    die_at_any_call(cache_medium, monkeypatch, done, 11)


def die_at_any_call(
    medium: Medium, monkeypatch: pytest.MonkeyPatch, done: bool, step: int
) -> None:
    for fatal in itertools.count(int(done), step):
        if medium.shared:
            medium.clear()
        medium.prefix += 'x'
        story = Story(medium, lambda now: _set_time(monkeypatch, now))
        with failing(monkeypatch, fatal, done, Died):
            story.tell()
        story.check()
        story.repeat()
        if len(story.told) == 8:
            assert fatal > 80
            return


@pytest.mark.parametrize('done', [False, True], ids=['before', 'after'])
def test_a_firing_whose_answer_is_lost_at_any_call_is_safe_to_repeat(
    cache_medium: Medium, monkeypatch: pytest.MonkeyPatch, done: bool
):
    for fatal in itertools.count():
        manager = cache_medium.manager(TASKS, f'order:{done}:{fatal}')
        manager.fire('a')
        event_id = None
        with failing(monkeypatch, fatal, done, StorageUnavailable) as calls:
            try:
                manager.fire('b')
            except StorageUnavailable as exc:
                event_id = exc.event_id
                assert event_id
            total = calls()
        manager.fire('b', event_id=event_id)
        fired = [record.trigger for record in manager.storage.history]
        assert fired == (['a', 'b'] if event_id else ['a', 'b', 'b'])
        assert list(manager.storage.instances) == ['t_join#0', 't_late#0']
        if fatal > total:
            assert total > 8
            return


def _set_time(monkeypatch: pytest.MonkeyPatch, now: int) -> None:
    monkeypatch.setattr(CacheStorageBackend, 'now', lambda _: now)
