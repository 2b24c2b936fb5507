"""Processes that fork, as Celery's prefork pool does: no connection is used twice."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from celery_triggers.testing.conformance.support import statuses
from celery_triggers.testing.media import Medium

EACH = {'t_each': {'andEvery': 'a', 'run': 'x'}}


def in_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as exc:  # pytest's own must not go on in the child
            print(repr(exc), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_manager_is_of_use_in_a_child_and_still_in_its_parent(shared_medium: Medium):
    manager = shared_medium.manager(EACH)
    manager.fire('a')
    for number in range(3):
        assert in_child(lambda: [manager.fire('a') for _ in range(3)]) == 0
        manager.fire('a', {'n': number})
    assert len(statuses(manager)) == 13
