"""Every medium that the conformance suite and the model run over here.

A medium of another storage is one more entry of ``MEDIA``: its registry key, its URL and its
name; where a server must be there, or clearing takes more than deleting the sessions, it has
a class of its own. Racing processes import this module, so what is heavy or needs a setup is
imported in the methods.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from celery_triggers.storages.sql.database import databases
from celery_triggers.storages.sql.dialects import dialect_of
from celery_triggers.testing.media import Medium
from tests.parts import servers
from tests.parts.servers import CONFORMANCE_DB, nothing_may_be_missing, redis_url


@dataclass
class OwnMedium(Medium):
    """A medium of these tests, whose server may be missing."""

    def missing(self) -> str:
        """Return what is not there, in words, or ``''`` if the medium can be used."""
        return ''


@dataclass
class RedisMedium(OwnMedium):
    """Others use the same database."""

    def clear(self) -> None:
        with redis.Redis.from_url(str(self.url)) as client:
            keys = list(client.scan_iter(f'{self.prefix}*', count=1000))
            for start in range(0, len(keys), 1000):
                client.delete(*keys[start : start + 1000])


@dataclass
class ClusterMedium(OwnMedium):
    """A cluster of three nodes, started when it is first needed."""

    def open(self, folder: Path) -> Medium:
        from tests.parts.redis_servers import start_cluster

        return replace(super().open(folder), url=start_cluster().url)

    def clear(self) -> None:
        from tests.parts.redis_servers import start_cluster

        start_cluster().clear(self.prefix)


@dataclass
class ServerMedium(OwnMedium):
    """A database server: a run's tests share their tables, which takes long to make."""

    def missing(self) -> str:
        url = sa.make_url(str(self.url))
        engine = sa.create_engine(dialect_of(url).url(url))
        try:
            with engine.connect():
                return ''
        except sa.exc.OperationalError as exc:
            return str(exc.orig)
        finally:
            engine.dispose()

    def open(self, folder: Path) -> Medium:
        return replace(self, prefix=own_prefix())

    def clear(self) -> None:
        clear_tables(str(self.url), self.prefix)


def own_prefix() -> str:
    """Return the beginning of the names of this run's tables, which go when it ends."""
    return f'test-{os.getpid()}'


def clear_tables(url: str, prefix: str) -> None:
    """Empty the tables of this prefix and drop those of the prefixes that begin with it."""
    engine = databases.get(url, prefix, options={}).engine
    with engine.begin() as connection:
        for name in sa.inspect(connection).get_table_names():
            if name.startswith(f'{prefix}_'):
                own = name.count('_') == prefix.count('_') + 1
                quoted = engine.dialect.identifier_preparer.quote(name)
                if own and not name.endswith('_schema'):
                    connection.execute(sa.text(f'DELETE FROM {quoted}'))
                elif not own:
                    connection.execute(sa.text(f'DROP TABLE {quoted}'))


def drop_tables() -> None:
    """Drop the tables that this run's tests shared."""
    for database in databases:
        if database.prefix.startswith(own_prefix()):
            database.tables.metadata.drop_all(database.engine)
            database.place = ''
    of_django = sys.modules.get('tests.django.databases')
    if of_django is not None:
        of_django.drop()


@dataclass
class SQLiteMedium(OwnMedium):
    """A file, which goes with its folder."""

    def clear(self) -> None:
        """Leave it to pytest."""


@dataclass
class CacheMedium(OwnMedium):
    """A cache of Django's on a Redis that others use too, or on a Memcached of its own."""

    def missing(self) -> str:
        from tests.parts import memcached

        return memcached.missing() if 'memcached' in str(self.url) else ''

    def prepare(self) -> None:
        from tests import django_settings
        from tests.parts import memcached

        django_settings.set_up()
        if 'memcached' in str(self.url):
            memcached.start()

    def clear(self) -> None:
        with redis.Redis.from_url(redis_url(CONFORMANCE_DB)) as client:
            keys = list(client.scan_iter(f'*:{self.prefix}:*', count=1000))
            for start in range(0, len(keys), 1000):
                client.delete(*keys[start : start + 1000])


@dataclass
class DjangoMedium(OwnMedium):
    """A database of a Django project, under an alias of the tests' settings."""

    @property
    def alias(self) -> str:
        return str(self.url).removeprefix('django://')

    def missing(self) -> str:
        from tests.django import databases

        return databases.missing(self.alias)

    def prepare(self) -> None:
        from tests.django import databases

        databases.prepare(self.alias)

    def clear(self) -> None:
        from tests.django import databases

        databases.clear(self.alias)


MEDIA: list[OwnMedium] = [
    OwnMedium('memory', 'memory://', shared=False),
    RedisMedium('redis', redis_url(CONFORMANCE_DB), big_race=True),
    ClusterMedium('redis', name='redis-cluster'),
    SQLiteMedium('sql', 'sqlite:///{folder}/triggers.db', name='sql-sqlite', big_race=True),
    ServerMedium(
        'sql', servers.fast(servers.POSTGRESQL), name='sql-postgresql', big_race=True
    ),
    ServerMedium('sql', servers.MARIADB, name='sql-mariadb'),
    CacheMedium('cache', 'cache://redis', name='cache-redis'),
    CacheMedium('cache', 'cache://memcached', name='cache-memcached'),
    DjangoMedium('django', 'django://sqlite', name='django-sqlite'),
    DjangoMedium('django', 'django://postgresql', name='django-postgresql'),
    DjangoMedium('django', 'django://mariadb', name='django-mariadb'),
]

_missing: dict[str, str] = {}


def missing() -> dict[str, str]:
    """Return which media cannot be used, and why: ``{name: what is not there}``."""
    if not _missing:
        _missing.update({medium.name: medium.missing() for medium in MEDIA})
    return {name: what for name, what in _missing.items() if what}


def present() -> list[OwnMedium]:
    """Return the media that can be used.

    Raises:
        pytest.UsageError: One cannot be used where nothing may be missing.
    """
    if nothing_may_be_missing() and missing():
        raise pytest.UsageError(f'CI=true, and not everything is there: {missing()}')
    return [medium for medium in MEDIA if medium.name not in missing()]


def named(name: str) -> OwnMedium:
    """Return a medium by its name."""
    return next(medium for medium in MEDIA if medium.name == name)
