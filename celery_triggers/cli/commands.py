"""``celery -A <app> triggers ...``: what people do from the command line.

Celery loads this module for every ``celery`` command, through the entry point group
``celery.commands``: what a command needs it imports when it is run.
"""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryCommand

__all__ = ['triggers']


@click.group()
def triggers() -> None:
    """Look after sessions and their storage."""


@triggers.command(cls=CeleryCommand)
@click.option(
    '--from', 'version', type=click.IntRange(min=0), default=0, show_default=True,
    help='The version of the tables that are there; 0: there are none.',
)
@click.option('--url', help='The database; by default the one that triggers_storage names.')
@click.option('--prefix', help='What the names of tables begin with; by default '
              'triggers_key_prefix.')
@click.pass_context
def schema(ctx: Any, version: int, url: str | None, prefix: str | None) -> None:
    """Print the SQL that makes the tables of the storage sql, or brings them up to date.

    For teams that run migrations themselves: set triggers_storage_options to
    {'create_tables': False}, and no process makes tables any more.
    """
    from celery_triggers.exceptions import TriggersError
    from celery_triggers.storages.sql import SQLStorageBackend
    from celery_triggers.storages.sql.database import ddl
    from celery_triggers.storages.sql.schema import LATEST
    from celery_triggers.wiring import services_of

    settings = services_of(ctx.obj.app).settings
    try:
        if url is None:
            key, url = settings.storage_location()
            if key != SQLStorageBackend.key:
                raise click.ClickException(
                    f'the sessions of this application are kept by the storage {key!r}, which '
                    'has no such tables; name a database with --url'
                )
        if version > LATEST:
            raise click.BadParameter(f'the latest version is {LATEST}', param_hint='--from')
        for statement in ddl(
            url or SQLStorageBackend.default_url, prefix or settings.key_prefix, after=version
        ):
            click.echo(statement)
    except TriggersError as exc:
        raise click.ClickException(str(exc)) from exc
