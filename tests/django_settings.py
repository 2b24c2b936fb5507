"""Django's settings in tests: databases and caches, by their aliases.

``set_up()`` makes a process ready. The environment says where things are, and is set where it
does not, so that the processes that a test starts find the same: ``TRIGGERS_TEST_DJANGO`` is a
folder, ``TRIGGERS_TEST_CACHE_PREFIX`` begins the keys of caches, ``TRIGGERS_TEST_MEMCACHED``
is the server that :mod:`tests.parts.memcached` starts,
``TRIGGERS_TEST_DJANGO_NAME`` is this run's schema in PostgreSQL and database in MariaDB, which
:mod:`tests.django.databases` makes.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from urllib.parse import urlsplit

import django
import pymysql

from tests.parts import servers


def _own(variable: str, value: str) -> str:
    """Return what this run has of its own: what the environment says, or else the value.

    Each of several processes that share the tests has its own, also where the one that
    started them had settled it.
    """
    known = os.environ.get(variable, '') or value
    worker = os.environ.get('PYTEST_XDIST_WORKER', '')
    if not known.endswith(worker):
        known += f'_{worker}'
    os.environ[variable] = known
    return known


def _folder() -> str:
    given = os.environ.get('TRIGGERS_TEST_DJANGO')
    name = f'triggers-django-{secrets.token_hex(6)}'
    folder = _own('TRIGGERS_TEST_DJANGO', os.path.join(tempfile.gettempdir(), name))
    if folder != given:
        os.makedirs(folder, exist_ok=True)
        atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


FOLDER = _folder()
CACHE_PREFIX = _own('TRIGGERS_TEST_CACHE_PREFIX', f'test-{secrets.token_hex(6)}')
# A socket, since another program cannot take its place. Each process of a run has its own.
MEMCACHED = os.environ.get('TRIGGERS_TEST_MEMCACHED') or (
    f'unix:{FOLDER}/memcached{os.environ.get("PYTEST_XDIST_WORKER", "")}.sock'
)

OWN_NAME = _own('TRIGGERS_TEST_DJANGO_NAME', f'test_{secrets.token_hex(6)}')

_postgresql, _mariadb = urlsplit(servers.POSTGRESQL), urlsplit(servers.MARIADB)

#: Whether SQLite has these options.
_IS_NEW = django.VERSION >= (5, 1)

# MariaDB by the driver that the other tests use.
pymysql.install_as_MySQLdb()

SECRET_KEY = 'of tests'
USE_TZ = True
DEFAULT_AUTO_FIELD = 'django.db.models.BigAutoField'
INSTALLED_APPS = [
    'django.contrib.admin',
    'django.contrib.auth',
    'django.contrib.contenttypes',
    'django.contrib.messages',
    'django.contrib.sessions',
    'celery_triggers.contrib.django',
]
MIDDLEWARE = [
    'django.contrib.sessions.middleware.SessionMiddleware',
    'django.contrib.auth.middleware.AuthenticationMiddleware',
    'django.contrib.messages.middleware.MessageMiddleware',
]
TEMPLATES = [
    {
        'BACKEND': 'django.template.backends.django.DjangoTemplates',
        'APP_DIRS': True,
        'OPTIONS': {
            'context_processors': [
                'django.template.context_processors.request',
                'django.contrib.auth.context_processors.auth',
                'django.contrib.messages.context_processors.messages',
            ]
        },
    }
]
ALLOWED_HOSTS = ['*']
ROOT_URLCONF = 'tests.django.urls'
STATIC_URL = 'static/'

DATABASES = {
    'default': {
        'ENGINE': 'django.db.backends.sqlite3',
        'NAME': f'{FOLDER}/default.sqlite3',
        'OPTIONS': {'timeout': 30, **({'transaction_mode': 'IMMEDIATE'} if _IS_NEW else {})},
    },
    'postgresql': {
        'ENGINE': 'django.db.backends.postgresql',
        'HOST': _postgresql.hostname,
        'PORT': _postgresql.port or 5432,
        'USER': _postgresql.username,
        'PASSWORD': _postgresql.password or '',
        'NAME': _postgresql.path.strip('/'),
        'OPTIONS': {
            'options': f'-c search_path={OWN_NAME} -c synchronous_commit=off',
            'application_name': OWN_NAME,
        },
    },
    'mariadb': {
        'ENGINE': 'django.db.backends.mysql',
        'HOST': _mariadb.hostname,
        'PORT': _mariadb.port or 3306,
        'USER': _mariadb.username,
        'PASSWORD': _mariadb.password or '',
        'NAME': OWN_NAME,
        'OPTIONS': {'charset': 'utf8mb4'},
    },
    # As a project has it that nobody thought about, but that no test waits for the disk.
    'sqlite': {
        'ENGINE': 'django.db.backends.sqlite3',
        'NAME': f'{FOLDER}/plain.sqlite3',
        'OPTIONS': {'init_command': 'PRAGMA synchronous=OFF'} if _IS_NEW else {},
    },
}

_redis = {
    'BACKEND': 'django.core.cache.backends.redis.RedisCache',
    'LOCATION': servers.redis_url(servers.CONFORMANCE_DB),
}
CACHES = {
    'default': {**_redis, 'KEY_PREFIX': CACHE_PREFIX},
    'redis': {**_redis, 'KEY_PREFIX': f'{CACHE_PREFIX}-redis'},
    'memcached': {
        'BACKEND': 'django.core.cache.backends.memcached.PyMemcacheCache',
        'LOCATION': MEMCACHED,
        'KEY_PREFIX': CACHE_PREFIX,
    },
    'database': {
        'BACKEND': 'django.core.cache.backends.db.DatabaseCache',
        'LOCATION': 'triggers_test_cache',
        'OPTIONS': {'MAX_ENTRIES': 1_000_000},
    },
    'local': {
        'BACKEND': 'django.core.cache.backends.locmem.LocMemCache',
        'LOCATION': 'triggers',
        'OPTIONS': {'MAX_ENTRIES': 1_000_000},
    },
}


def set_up() -> None:
    """Configure Django in this process, once.

    Not by ``DJANGO_SETTINGS_MODULE``: Celery applications of other tests would take it for
    theirs.
    """
    from django.conf import settings

    if not settings.configured:
        settings.configure(**{name: value for name, value in globals().items() if name.isupper()})
        django.setup()
