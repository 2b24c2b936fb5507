"""The database's clock in expressions of the ORM."""

from __future__ import annotations

from typing import Any

from django.db.models import BigIntegerField, Func

from celery_triggers.storages.records import host_time

__all__ = ['Clock', 'clock_sql']


class Clock(Func):
    """The wall clock in milliseconds: not the time when the transaction began."""

    arity = 0
    output_field = BigIntegerField()

    def as_postgresql(self, _compiler: Any, _connection: Any, **_: Any) -> Any:
        return 'CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS bigint)', ()

    def as_mysql(self, _compiler: Any, _connection: Any, **_: Any) -> Any:
        # Of the statement, and in no time zone: UNIX_TIMESTAMP() would go through the
        # session's, in which an hour may come twice.
        return "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000)", ()

    def as_sqlite(self, _compiler: Any, _connection: Any, **_: Any) -> Any:
        # The file has no clock of its own.
        return '%s', (host_time(),)


def clock_sql(connection: Any) -> tuple[str, Any]:
    """Return the clock alone, as SQL and its parameters, for a query without a table."""
    of_vendor = getattr(Clock(), f'as_{connection.vendor}')
    found: tuple[str, Any] = of_vendor(None, connection)
    return found
