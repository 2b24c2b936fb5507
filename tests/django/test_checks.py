"""``manage.py check``: what it says about a wrong configuration, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from celery import _state

from tests import django_settings
from tests.django.conftest import project_app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    django_settings.set_up()
    before = _state._tls.current_app
    yield
    _state._tls.current_app = before


def ids(*, deploy: bool = False) -> list[str]:
    """Run the checks; return the ids of our messages."""
    from django.core.checks import run_checks

    return [m.id for m in messages(run_checks(include_deployment_checks=deploy))]


def messages(found: list[Any]) -> list[Any]:
    return [message for message in found if message.id.startswith('celery_triggers.')]


def said() -> str:
    from django.core.checks import run_checks

    (message,) = messages(run_checks())
    return f'{message.msg} {message.hint or ""}'


def current(storage: str | None = 'django', **settings: Any) -> Any:
    app = project_app(storage, **settings)
    app.set_current()
    return app


def test_nothing_is_said_about_what_is_right():
    current('django')
    assert ids() == []


@pytest.mark.parametrize(
    ('storage', 'settings', 'wanted', 'words'),
    [
        ('django', {'triggers_lease': 0}, 'E001', 'triggers_lease must be seconds'),
        ('django', {'triggers_unheard': 'shout'}, 'E001', "'warn', 'ignore' or 'raise'"),
        ('django', {'triggers_manager': 'nobody'}, 'E002', 'trigger manager'),
        ('django', {'triggers_runner': 'nobody'}, 'E002', 'task runner'),
        ('nowhere', {}, 'E002', 'storage backend'),
        ('django://nowhere', {}, 'E003', 'DATABASES has no such alias'),
        ('django', {'triggers_storage_options': {'x': 1}}, 'E003', 'has no options'),
        ('memory', {'broker_url': 'redis://', 'triggers_runner': 'celery'}, 'E003', 'memory'),
        (None, {'broker_url': 'amqp://'}, 'E003', 'no storage for sessions'),
        ('cache://local', {}, 'E003', 'LocMemCache'),
        (None, {'broker_url': 'redis://'}, 'W003', 'kept in redis'),
    ],
)
def test_wrong_settings(
    storage: str | None, settings: dict[str, Any], wanted: str, words: str
):
    current(storage, **settings)
    assert ids() == [f'celery_triggers.{wanted}']
    assert words in said()


def test_a_misspelled_setting():
    from django.test import override_settings

    with override_settings(
        SHOP_TRIGGERS_STORAGE='django', SHOP_TRIGGERS_LEESE=3, SHOP_BROKER_URL='memory://'
    ):
        app = current(None)
        app.conf.triggers_storage = 'django'
        app.namespace = 'SHOP'
        assert ids() == ['celery_triggers.W002']
        assert 'SHOP_TRIGGERS_LEESE. Did you mean SHOP_TRIGGERS_LEASE?' in said()


@pytest.mark.parametrize(
    ('alias', 'changes', 'wanted'),
    [
        ('postgresql', {'AUTOCOMMIT': False}, 'E005'),
        ('default', {'NAME': ':memory:'}, 'E006'),
        ('sqlite', {'OPTIONS': {'transaction_mode': 'IMMEDIATE'}}, None),
        ('mariadb', {'OPTIONS': {'isolation_level': 'repeatable read'}}, 'W004'),
        ('mariadb', {'OPTIONS': {'isolation_level': 'read committed'}}, None),
    ],
)
def test_databases_that_will_not_do(alias: str, changes: dict[str, Any], wanted: str | None):
    from django.db import connections

    connections.settings['wrong'] = {**connections.settings[alias], **changes}
    try:
        current('django://wrong')
        assert ids() == ([f'celery_triggers.{wanted}'] if wanted else [])
    finally:
        del connections['wrong']
        del connections.settings['wrong']


class NowhereElse:
    """Lets tables be made in the default database alone."""

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool:
        return db == 'default'


@pytest.mark.skipif(django.VERSION < (5, 1), reason='it cannot be had otherwise')
def test_sqlite_as_projects_begin_with_it():
    current('django://sqlite')
    assert ids() == ['celery_triggers.W006']
    assert "{'transaction_mode': 'IMMEDIATE'}" in said()


def test_routers_that_let_no_tables_be_made():
    from django.test import override_settings

    with override_settings(DATABASE_ROUTERS=[f'{__name__}.NowhereElse']):
        current('django://postgresql')
        assert ids() == ['celery_triggers.E004']
        current('django://default')
        assert ids() == []


def test_a_deployment():
    app = current('django://default')
    assert ids(deploy=True) == ['celery_triggers.W005']
    current('django://postgresql')
    assert ids(deploy=True) == []
    app = current('django://postgresql')
    app.trigger_task(after=['a'], using='nobody', trigger_name='t_wrong')(lambda context: None)
    assert ids() == []
    assert ids(deploy=True) == ['celery_triggers.E007']


def test_checks_ask_no_server(monkeypatch: pytest.MonkeyPatch):
    from django.db import connections

    connections.settings['away'] = {**connections.settings['postgresql'], 'PORT': 1}
    try:
        current('django://away')
        assert ids(deploy=True) == []
    finally:
        del connections['away']
        del connections.settings['away']


# --------------------------------------------------------------- projects of their own


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Make a Django project; return what runs Python in it."""

    def make(
        script: str, *, apps: str = "'celery_triggers.contrib.django'", application: bool = True
    ) -> subprocess.CompletedProcess[str]:
        package = tmp_path / 'proj'
        package.mkdir()
        (package / '__init__.py').write_text(
            'from proj.celery import app\n' if application else ''
        )
        (package / 'celery.py').write_text(
            "from celery import Celery\n"
            "app = Celery('proj')\n"
            "app.config_from_object('django.conf:settings', namespace='CELERY')\n"
        )
        (package / 'settings.py').write_text(
            f"INSTALLED_APPS = [{apps}]\n"
            "SECRET_KEY = 'x'\n"
            "DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': 'db'}}\n"
            "SILENCED_SYSTEM_CHECKS = ['celery_triggers.W006']\n"
            "CELERY_BROKER_URL = 'memory://'\n"
            "CELERY_TRIGGERS_STORAGE = 'django'\n"
            "CELERY_TRIGGERS_LEASE = 17\n"
        )
        return subprocess.run(
            [sys.executable, '-c', script], cwd=tmp_path, text=True, capture_output=True,
            timeout=60, check=False,
            env={
                'PATH': '/usr/bin:/bin', 'DJANGO_SETTINGS_MODULE': 'proj.settings',
                'PYTHONPATH': f'{tmp_path}:{ROOT}',
            },
        )

    return make


MANAGE = 'from django.core.management import execute_from_command_line as run; run'


def test_a_project_without_a_celery_application(project: Any):
    done = project(f"{MANAGE}(['manage.py', 'check'])", application=False)
    assert 'celery_triggers.W001' in done.stderr
    assert 'from .celery import app as celery_app' in done.stderr


def test_settings_come_from_django(project: Any):
    done = project(
        f"{MANAGE}(['manage.py', 'check', '--fail-level', 'WARNING'])\n"
        'from celery_triggers.wiring import services_of; from proj import app\n'
        'print(services_of(app).settings.lease, app.triggers.session("x").storage.alias)\n'
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace('(1 sil', '(0 sil').splitlines() == [
        'System check identified no issues (0 silenced).', '17 default'
    ]


def test_a_process_that_nobody_has_set_up_can_fire(project: Any):
    done = project(
        f"{MANAGE}(['manage.py', 'migrate', '-v0'])\n"
        'import subprocess, sys\n'
        'script = "from proj import app; print(app.triggers.fire(\'x\', \'a\').pending)"\n'
        'sys.exit(subprocess.call([sys.executable, "-c", script]))\n'
    )
    assert (done.returncode, done.stdout) == (0, 'False\n'), done.stderr


def test_a_storage_whose_application_is_not_installed_says_so(project: Any):
    done = project("from proj import app; app.triggers.fire('x', 'a')", apps='')
    assert done.returncode == 1
    assert "add 'celery_triggers.contrib.django' to INSTALLED_APPS" in done.stderr
    assert 'StorageNotConfigured' in done.stderr


def test_a_worker_whose_application_is_not_installed_ends(project: Any):
    done = project(
        "import sys; sys.argv = ['celery', '-A', 'proj', 'worker']\n"
        'from celery.__main__ import main; main()', apps='',
    )
    assert done.returncode == 1
    assert "add 'celery_triggers.contrib.django' to INSTALLED_APPS" in done.stderr


def test_without_a_project_there_is_no_storage(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, '-c',
         'from celery_triggers.storages import storage_backends\n'
         "storage_backends.get_class('django')"],
        cwd=tmp_path, text=True, capture_output=True, timeout=60, check=False,
        env={'PATH': '/usr/bin:/bin'},
    )
    assert 'StorageNotConfigured: the storage django needs a Django project' in done.stderr
