"""The pages are true: their blocks run, and they speak of everything that there is."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import _state
from celery.app import builtins  # noqa: F401  (registers Celery's own tasks, once for all pages)

import celery_triggers
from celery_triggers.engine.transitions import BY_HAND, TRANSITIONS, Event, Status
from celery_triggers.registry import storage_backends, task_runners, trigger_managers
from celery_triggers.settings import DEFAULTS
from celery_triggers.storages.memory import MemoryStorageBackend
from celery_triggers.storages.sql.database import databases
from tests.docs import blocks
from tests.parts.servers import DOCS_DB, redis_url

ROOT = blocks.ROOT
PAGES = blocks.pages()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader's desk: an empty folder, no application, no session."""
    monkeypatch.chdir(tmp_path)
    current, default = _state._tls.current_app, _state.default_app
    finalizers = set(_state._on_app_finalizers)
    for registry in (storage_backends, task_runners, trigger_managers):
        # What a page registers would take the place of another test's.
        monkeypatch.setattr(registry, '_registry', dict(registry._registry))
    MemoryStorageBackend.clear()
    yield
    MemoryStorageBackend.clear()
    _state._tls.current_app, _state.default_app = current, default
    _state._on_app_finalizers.intersection_update(finalizers)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, reader: None) -> None:
    url, prefix = redis_url(DOCS_DB), f'docs-{secrets.token_hex(6)}'
    # Django can be set up once in a process, and here it is so for other tests.
    run = run_alone if 'settings.configure(' in page.read_text() else blocks.run_page
    try:
        run(page, url, prefix)
    finally:
        for database in databases:
            if database.prefix == prefix:
                database.tables.metadata.drop_all(database.engine)
        client = redis.Redis.from_url(url)
        for key in client.scan_iter(f'{prefix}:*'):
            client.delete(key)


def run_alone(page: Path, url: str, prefix: str) -> None:
    """Run a page in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-m', 'tests.docs.blocks', str(page), url, prefix],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_overlooked(page: Path) -> None:
    opened = re.findall(r'^ *```(\S.*)$', page.read_text(), re.MULTILINE)
    found = blocks.parse(page)
    directives = [line for line in opened if line.startswith('{')]
    assert len(found) == len(opened) - len(directives)


def block_after(text: str, language: str, number: int = 0) -> str:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)[number]


def test_the_readme_shows_the_program_that_its_command_runs() -> None:
    readme = (ROOT / 'README.md').read_text()
    program = (ROOT / 'examples' / 'hello.py').read_text()
    assert block_after(readme, 'python') == program
    assert '$ python examples/hello.py\n' in block_after(readme, 'console')
    assert blocks.imports_of(program) == {'celery'}


def test_every_setting_is_described_in_more_than_its_name() -> None:
    page = (ROOT / 'docs' / 'running' / 'settings.md').read_text()
    described = dict(re.findall(r'^:::\{setting\} (\w+)\n(.*?)^:::', page, re.M | re.S))
    assert described.keys() == DEFAULTS.keys()
    assert not [name for name, text in described.items() if len(text.split()) < 8]


def test_the_generated_tables_hold_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'docs' / '_ext'))
    import from_code

    assert from_code.MEANINGS.keys() == set(Event)
    shown = {
        (source, meaning, to)
        for sources, meaning, to, _ in from_code.transition_rows()
        for source in sources.split(', ')
    }
    assert shown == {
        (source.value, from_code.MEANINGS[event][0], to.value)
        for event, steps in TRANSITIONS.items()
        for source, to in steps.items()
    }
    assert {(to, s) for to, sources in from_code.by_hand_rows() for s in sources.split(', ')} == {
        (to.value, source.value) for to, sources in BY_HAND.items() for source in sources
    }
    page = (ROOT / 'docs' / 'rules' / 'instances.md').read_text()
    assert all(f'`{status}`' in page for status in Status)


def test_the_tests_on_the_page_about_testing_pass(tmp_path: Path) -> None:
    page = (ROOT / 'docs' / 'running' / 'testing.md').read_text()
    application, *tests = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)
    (tmp_path / 'shop.py').write_text(application)
    (tmp_path / 'test_shop.py').write_text('\n\n'.join(['from shop import *', *tests]))
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parametrized = page.count("'packed', [")
    assert f'{len(re.findall(r"def test_", page)) + parametrized} passed' in done.stdout


#: Modules whose ``__all__`` is public, with the package's own.
PUBLIC = [
    'celery_triggers',
    'celery_triggers.exceptions',
    'celery_triggers.manager',
    'celery_triggers.runners',
    'celery_triggers.storages',
    'celery_triggers.task',
    'celery_triggers.testing',
]


@pytest.fixture(scope='session')
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('html')
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html',
         str(ROOT / 'docs'), str(folder)],
        capture_output=True, text=True, timeout=240, check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_pages_build_without_a_warning(built: Path) -> None:
    assert (built / 'index.html').exists()


def test_the_reference_holds_every_public_name(built: Path) -> None:
    from importlib import import_module

    from sphinx.util.inventory import InventoryFile

    with (built / 'objects.inv').open('rb') as stream:
        inventory = InventoryFile.load(stream, '', lambda base, path: path)
    names = {name.rpartition('.')[2] for kind in inventory for name in inventory[kind]}
    for module in PUBLIC:
        public = set(import_module(module).__all__) - {'__version__'}
        assert public <= names, f'{module}: {sorted(public - names)}'
    assert set(DEFAULTS) <= set(inventory['std:confval'])


#: What the pages must not say, and why.
FORBIDDEN = {
    r'/tmp/|/work/|/root/|/home/': 'a path of one machine',
    r'design\.md|celery-facts': 'a text that readers do not have',
    '\N{EM DASH}': 'a dash where a full stop or a comma does',
}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_speak_of_the_product_alone(page: Path) -> None:
    text = page.read_text()
    for pattern, why in FORBIDDEN.items():
        assert not re.search(pattern, text), why


def test_links_between_the_readme_and_the_pages_lead_somewhere() -> None:
    readme = (ROOT / 'README.md').read_text()
    targets = re.findall(r'\]\((?!https?:|#)([^)#]+)', readme)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_package_says_its_version() -> None:
    assert celery_triggers.__version__
