"""A package of somebody else's: it is installed, found by its keys, used, and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

REGISTRIES = """
from celery_triggers.manager import trigger_managers
from celery_triggers.runners import task_runners
from celery_triggers.storages import storage_backends

for registry, key in (
    (storage_backends, 'files'), (trigger_managers, 'noting'), (task_runners, 'by-kind')
):
    assert key in registry.known()
    print(registry.get_class(key).__module__)
"""

APPLICATION = """
import logging, sys
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery_triggers.testing.conformance.support import eventually, statuses

logger = logging.getLogger('triggers_shelf')
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler(sys.stdout))
app = Celery('shop', broker='memory://', task_cls='celery_triggers:TriggerTask')
app.conf.update(
    triggers_storage=sys.argv[1], triggers_manager='noting', triggers_runner='by-kind'
)

@app.trigger_task(after=['paid', 'packed'], bind=True, sessions='order:')
def ship(self, context):
    return {'queue': self.request.delivery_info['routing_key']}

app.triggers.fire('order:1', 'paid')
app.triggers.fire('order:1', 'packed')
session = app.triggers.session('order:1')
with start_worker(app, queues=['order'], perform_ping_check=False):
    eventually(lambda: statuses(session) == {'t_ship#0': 'finished'}, 'it has run')
print(session.storage['t_ship#0'].result, *app.triggers.sessions())
"""

#: A conftest.py whose storage overwrites what others have saved.
CARELESS = """
from celery_triggers.storages import storage_backends
from celery_triggers.testing import Medium
from triggers_shelf.storage import FileStorageBackend

@storage_backends.register('careless')
class CarelessStorageBackend(FileStorageBackend):
    key = 'careless'

    def save_document(self, name, text, version):
        return super().save_document(name, text, self.load_document(name)[1])

def pytest_triggers_media():
    return [Medium('careless', 'careless://{folder}')]
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages, as pip installs them."""
    sources, site = tmp_path_factory.mktemp('sources'), tmp_path_factory.mktemp('site')
    # Copies, since building leaves things beside what is built.
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, sources)
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'celery_triggers', sources / 'celery_triggers', ignore=ignored)
    shutil.copytree(ROOT / 'tests' / 'shelf_package', sources / 'shelf', ignore=ignored)
    done = subprocess.run(
        [
            sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index',
            '--no-build-isolation', '--disable-pip-version-check', '--target', str(site),
            str(sources), str(sources / 'shelf'),
        ],
        capture_output=True, text=True, timeout=180, check=False,
    )
    assert done.returncode == 0, done.stderr
    return site


def python(
    site: Path, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, where only what is installed can be found."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True, text=True, timeout=240, check=False,
    )


def conformance(
    site: Path, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    options = ['-q', '-p', 'no:cacheprovider', '--strict-markers']
    module = 'celery_triggers.testing.conformance'
    return python(site, folder, '-m', 'pytest', *options, '--pyargs', module, *arguments)


def counted(output: str, outcome: str) -> int:
    found = re.search(rf'(\d+) {outcome}', output.splitlines()[-1])
    return int(found[1]) if found else 0


def test_its_keys_are_found(site: Path, tmp_path: Path) -> None:
    done = python(site, tmp_path, '-c', REGISTRIES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f'triggers_shelf.{n}' for n in ('storage', 'manager', 'runner')]


def test_an_application_names_them_in_its_settings(site: Path, tmp_path: Path) -> None:
    done = python(site, tmp_path, '-c', APPLICATION, f'files://{tmp_path}/shelf')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'order:1: paid released []',
        "order:1: packed released ['t_ship#0']",
        'order:1: t_ship released []',
        "{'queue': 'order'} order:1",
    ]


def test_its_storage_passes_the_conformance_suite(site: Path, tmp_path: Path) -> None:
    done = conformance(site, tmp_path, '--triggers-storage', 'files://{folder}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted(done.stdout, 'passed') > 360
    assert counted(done.stdout, 'skipped') == 1, 'the big race, which it does not ask for'


def test_a_storage_that_loses_changes_does_not(site: Path, tmp_path: Path) -> None:
    (tmp_path / 'conftest.py').write_text(CARELESS)
    done = conformance(site, tmp_path, '-k', 'test_firing and (meets_another or join_is_released)')
    assert (counted(done.stdout, 'passed'), counted(done.stdout, 'failed')) == (1, 1), done.stdout
    assert "assert [] == ['t_join#0']" in done.stdout, 'assertions say what they compared'


def test_nothing_is_tested_where_no_storage_is_named(site: Path, tmp_path: Path) -> None:
    done = conformance(site, tmp_path)
    assert done.returncode != 0
    assert 'give --triggers-storage URL' in done.stdout + done.stderr
