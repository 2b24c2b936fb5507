from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state

from celery_triggers.registry import task_runners
from celery_triggers.runners import BaseTaskRunner
from celery_triggers.testing.media import Medium
from tests.django import databases
from tests.media import named

ALIASES = ['sqlite', 'postgresql', 'mariadb']

TASKS: dict[str, Any] = {
    't_join': {'after': ['a', 'b'], 'run': 'x'},
    't_each': {'andEvery': 'item', 'run': 'x'},
}


@task_runners.register('django-tests')
class NotingRunner(BaseTaskRunner):
    """Does nothing but note what it is handed."""

    handed: list[str] = []

    def run(self, release: Any) -> None:
        self.handed.append(release.instance.name)


@pytest.fixture(params=ALIASES)
def alias(request: pytest.FixtureRequest) -> str:
    """Each database in turn."""
    return prepared(request.param)


@pytest.fixture
def postgresql() -> str:
    """The one database, where others would show nothing else."""
    return prepared('postgresql')


@pytest.fixture
def sqlite() -> str:
    return prepared('sqlite')


def prepared(alias: str) -> str:
    why = databases.skipping(alias)
    if why:
        pytest.skip(f'there is no {alias}: {why}')
    databases.prepare(alias)
    return alias


@pytest.fixture
def medium(alias: str, tmp_path: Path) -> Iterator[Medium]:
    yield from _opened(alias, tmp_path)


@pytest.fixture
def postgresql_medium(postgresql: str, tmp_path: Path) -> Iterator[Medium]:
    yield from _opened(postgresql, tmp_path)


@pytest.fixture
def sqlite_medium(sqlite: str, tmp_path: Path) -> Iterator[Medium]:
    yield from _opened(sqlite, tmp_path)


def _opened(alias: str, folder: Path) -> Iterator[Medium]:
    found = named(f'django-{alias}').open(folder)
    yield found
    found.clear()


@pytest.fixture
def app(alias: str, medium: Medium) -> Iterator[Celery]:
    """The project's Celery application, whose released instances are noted and not sent."""
    made = project_app(f'django://{alias}', medium.prefix)
    NotingRunner.handed.clear()
    before = _state._tls.current_app
    made.set_current()
    yield made
    _state._tls.current_app = before
    made.close()


def project_app(storage: str | None, prefix: str = 'triggers', **settings: Any) -> Celery:
    made = Celery('django-tests', broker='memory://', set_as_current=False)
    made.conf.update({
        'triggers_storage': storage, 'triggers_key_prefix': prefix,
        'triggers_runner': 'django-tests', 'triggers_unheard': 'ignore', **settings,
    })
    made.triggers.configure(TASKS)
    return made


@pytest.fixture
def handed() -> list[str]:
    """What the runner was handed."""
    return NotingRunner.handed


assert 'DJANGO_SETTINGS_MODULE' not in os.environ, 'Celery would take it for every test'
