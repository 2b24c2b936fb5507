"""Tests that mostly wait run beside each other, each still under its own name.

The first of them that is asked for starts all that pytest has selected, a few at a time; each
then waits for its own end. What one of them raises it raises, not another.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.arena import Arena
from tests.chaos.nursery import Nursery

#: How many at a time: they wait for leases and graces to pass, and share two processors.
AT_A_TIME = 4


def beside(function: Any) -> Any:
    """Make a test of a function whose first parameter is ``make_arena``."""

    @functools.wraps(function)
    def test(situations: Situations, request: pytest.FixtureRequest, **parameters: Any) -> None:
        situations.result_of(request.node)

    own = list(inspect.signature(function).parameters.values())[1:]
    asked = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in ('situations', 'request', *(parameter.name for parameter in own))
    ]
    test.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    test.situation = function  # type: ignore[attr-defined]
    return test


class Situations:
    """Runs the selected tests of this kind in threads."""

    def __init__(self, nursery: Nursery, folder: Path, items: list[Any]):
        self.nursery, self.folder = nursery, folder
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._results: dict[str, Future[None]] = {
            item.nodeid: self._pool.submit(self._run, number, item)
            for number, item in enumerate(items)
        }

    def result_of(self, item: Any) -> None:
        """Wait for a test's end; raise what it raised."""
        self._results[item.nodeid].result()

    def _run(self, number: int, item: Any) -> None:
        parameters = item.callspec.params if hasattr(item, 'callspec') else {}
        made: list[Arena] = []

        def make_arena(**settings: Any) -> Arena:
            folder = self.folder / f'{number}-{len(made)}'
            folder.mkdir()
            made.append(Arena(self.nursery, folder, **settings))
            return made[-1]

        try:
            item.function.situation(make_arena, **parameters)
        finally:
            for arena in made:
                arena.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope='session')
def situations(
    request: pytest.FixtureRequest, nursery: Nursery,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Situations]:
    """All selected tests that run beside each other, from the first one's start on."""
    items = [
        item for item in request.session.items
        if hasattr(getattr(item, 'function', None), 'situation')
    ]
    running = Situations(nursery, tmp_path_factory.mktemp('situations'), items)
    yield running
    running.close()
