from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.beside import situations
from tests.chaos.nursery import Nursery

__all__ = ['LONG', 'nursery', 'situations']

#: The long version of every test here: ``make chaos``.
LONG = os.environ.get('TRIGGERS_CHAOS') == 'long'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Celery warns about the task option queue=, which is passed on as it is.
    ignore = pytest.mark.filterwarnings(r"ignore:\s*The 'queue' task attribute")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(ignore)
            if LONG:
                item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope='session')
def nursery() -> Iterator[Nursery]:
    """A warm process, from which all others are forked."""
    made = Nursery()
    yield made
    made.close()
