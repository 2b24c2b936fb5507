"""Columns that compare byte by byte on every database."""

from __future__ import annotations

from typing import Any

from django.db import models

__all__ = ['ExactCharField', 'ExactTextField']

#: By the names that Django gives databases.
_COLLATIONS = {'postgresql': 'C', 'mysql': 'utf8mb4_bin'}


class _Exact(models.Field):
    """Where names differ by case alone, a collation of the database's might not see it.

    Those of MySQL also hold every character, whatever the database's own character set is.
    """

    def db_parameters(self, connection: Any) -> Any:
        found = super().db_parameters(connection)
        return {**found, 'collation': _COLLATIONS.get(connection.vendor)}


class ExactCharField(_Exact, models.CharField):
    """A short text."""

    def db_type(self, connection: Any) -> Any:
        found = super().db_type(connection)
        if connection.vendor == 'postgresql':
            # The same type by its other name: beside every unique "varchar" Django makes a
            # second index for LIKE, which in this collation the first one serves.
            return found.replace('varchar', 'character varying')
        return found


class ExactTextField(_Exact, models.TextField):
    """A text of any length."""
