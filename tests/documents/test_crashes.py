"""The process dies before or after any call of the medium; the next one goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from celery_triggers.testing.media import Medium
from tests.documents.shelf import Died, Shelf
from tests.documents.story import Story


@pytest.mark.parametrize('done', [False, True], ids=['before', 'after'])
def test_the_process_dies_at_any_call(shelf: Shelf, shelf_medium: Medium, done: bool):
    for fatal in itertools.count():
        shelf.documents.clear()
        story = Story(shelf_medium, lambda now: setattr(shelf, 'at', now))
        shelf.around = deadly(fatal, done)
        story.tell()
        shelf.around = lambda do: do()
        story.check()
        story.repeat()
        if len(story.told) == 8:
            assert fatal > 30
            return


def deadly(fatal: int, done: bool) -> Callable[[Callable[[], Any]], Any]:
    """Let a process die at its call of this number."""
    counter = itertools.count()

    def around(do: Callable[[], Any]) -> Any:
        number = next(counter)
        if number == fatal and not done:
            raise Died
        answer = do()
        if number == fatal:
            raise Died
        return answer

    return around
