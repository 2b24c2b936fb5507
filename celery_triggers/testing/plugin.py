"""The pytest plugin. Imports nothing until it is used.

The fixture ``triggers``, and how the conformance suite is told what storage to test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery_triggers.testing.kit import TriggersKit
    from celery_triggers.testing.media import Medium

#: What the fixture sets while a test runs. The broker's URL keeps a forgotten
#: ``apply_async`` from reaching a real one.
_SETTINGS = {
    'broker_url': 'memory://',
    'triggers_storage': 'memory',
    'triggers_runner': 'threading',
    'task_store_eager_result': True,
}


@pytest.fixture
def triggers() -> Iterator[TriggersKit]:
    """The current Celery application with sessions in memory and tasks in threads.

    Settings that it or the test changes are put back after the test, and its sessions
    forgotten.
    """
    from celery._state import get_current_app

    from celery_triggers.testing.kit import TriggersKit

    app: Any = get_current_app()
    before, pools = dict(app.conf.changes), (app._pool, app.amqp._producer_pool)
    app.conf.update(_SETTINGS)
    # Connections that are open already would still lead to the real broker.
    app._pool = app.amqp._producer_pool = None
    kit = TriggersKit(app)
    kit.clear()
    try:
        yield kit
        kit.join()
    finally:
        kit.clear()
        app.conf.changes.clear()
        app.conf.changes.update(before)
        app._pool, app.amqp._producer_pool = pools


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--triggers-storage``, which may be given several times."""
    parser.getgroup('celery_triggers').addoption(
        '--triggers-storage',
        action='append',
        default=[],
        metavar='URL',
        help='what celery_triggers.testing.conformance tests: a URL whose scheme is the '
        "storage's registry key, or the key alone; {folder} stands for an empty folder",
    )


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hook ``pytest_triggers_media``."""
    pluginmanager.add_hookspecs(Hooks)


class Hooks:
    """The hooks that a ``conftest.py`` may write."""

    @staticmethod
    def pytest_triggers_media() -> list[Medium]:  # type: ignore[empty-body]
        """Return the media that the conformance suite tests."""
