from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from celery_triggers.testing.media import Medium
from tests.documents.shelf import Shelf, ShelfStorageBackend


@pytest.fixture
def shelf_medium() -> Iterator[Medium]:
    url = f'shelf://{secrets.token_hex(6)}'
    ShelfStorageBackend.shelves[url] = Shelf()
    yield Medium('shelf', url, prefix='triggers')
    del ShelfStorageBackend.shelves[url]


@pytest.fixture
def shelf(shelf_medium: Medium) -> Shelf:
    return ShelfStorageBackend.shelves[shelf_medium.url]
