"""What an application sees: names at the top, and on ``app.triggers``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import celery_triggers
from tests.unit.test_application import make_app

#: By which an application may subclass, register and annotate, without a second import.
AT_THE_TOP = {
    'BaseTaskRunner', 'CacheStorageBackend', 'Celery', 'CeleryTaskRunner',
    'DocumentStorageBackend', 'FinalizingTriggerManager', 'Firing', 'MemoryStorageBackend',
    'RedisStorageBackend', 'SQLStorageBackend', 'Status', 'StorageBackend', 'SweepReport',
    'TaskConfig', 'TaskContext', 'TaskInstance', 'ThreadingTaskRunner', 'TriggerManager',
    'TriggerTask', '__version__', 'all_of', 'any_of', 'at_least', 'current_context', 'fire',
    'gate', 'kwarg', 'on', 'shared_trigger_task', 'storage_backends', 'task_runners',
    'trigger_managers',
}

ON_APP_TRIGGERS = {
    'afire', 'configure', 'delete', 'fire', 'fire_many', 'load', 'schema', 'session', 'sessions',
    'storage', 'sweep', 'tasks', 'trigger_task', 'workflow',
}

ON_A_SESSION = {
    'cancel', 'cancel_firing', 'clone_instance', 'create_instance', 'default_task_runner_name',
    'explain', 'finalizing', 'fire', 'get_unresolved_instances', 'get_unresolved_tasks', 'key',
    'mark_instance_logs_resolved', 'remove_tasks', 'replay_failed_instance',
    'resend_scheduled_instance', 'skip_failed_instance', 'start', 'storage', 'uid',
    'update_configuration', 'update_instance_metadata', 'update_instance_status',
}

ON_A_STORAGE = {
    'clone_instance', 'create_instance', 'debug_repr', 'delete', 'exists',
    'get_instances_with_unresolved_logs', 'get_unresolved_instances', 'get_unresolved_tasks',
    'history', 'instances', 'instances_of_task', 'key', 'latest_kwargs', 'metadata', 'tasks', 'uid',
}


def test_the_names_at_the_top() -> None:
    assert set(celery_triggers.__all__) == AT_THE_TOP
    assert set(dir(celery_triggers)) >= AT_THE_TOP


@pytest.mark.parametrize('name', sorted(AT_THE_TOP))
def test_each_of_them_can_be_imported(name: str) -> None:
    assert getattr(celery_triggers, name) is not None


def test_importing_the_package_imports_none_of_them() -> None:
    code = (
        'import sys, celery_triggers; '
        'print(*sorted(m for m in sys.modules if m.startswith("celery_triggers")))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ['celery_triggers', 'celery_triggers.hook']


def test_the_storages_own_import_of_2017_works() -> None:
    from celery_triggers import CacheStorageBackend, TriggerManager

    assert TriggerManager.__module__.startswith('celery_triggers.manager')
    assert CacheStorageBackend.key == 'cache'


def test_a_session_shows_what_an_application_uses() -> None:
    session = make_app(triggers_storage='memory').triggers.session('order:1')
    assert {name for name in dir(session) if not name.startswith('_')} == ON_A_SESSION
    assert {name for name in dir(session.storage) if not name.startswith('_')} == ON_A_STORAGE
    assert all(hasattr(session.storage, name) for name in ON_A_STORAGE)


def test_app_triggers_shows_what_an_application_uses() -> None:
    shown = {name for name in dir(make_app().triggers) if not name.startswith('_')}
    assert shown == ON_APP_TRIGGERS
