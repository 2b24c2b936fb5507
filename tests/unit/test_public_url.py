"""What may be shown of a URL."""

from __future__ import annotations

import pytest

from celery_triggers.storages.base import public_url


@pytest.mark.parametrize(('url', 'shown'), [
    ('redis://me:secret@host/0', 'redis://host/0'),
    ('redis://:sec/ret@host/0', 'redis://host/0'),
    ('redis://:sec@ret@host/0', 'redis://host/0'),
    ('redis://:sec;ret@host/0', 'redis://host/0'),
    ('sentinel://:secret@h1;sentinel://:secret@h2/0', 'sentinel://h1;sentinel://h2/0'),
    ('redis+cluster://me:secret@h1,h2?a=1', 'redis+cluster://h1,h2?a=1'),
    ('redis://h/0?password=secret&a=1', 'redis://h/0?password=***&a=1'),
    ('rediss://h/0?ssl_password=secret&a=1', 'rediss://h/0?ssl_password=***&a=1'),
    ('mysql://h/0?passwd=secret', 'mysql://h/0?passwd=***'),
    ('sqlite:////var/me@home/triggers.db', 'sqlite:////var/me@home/triggers.db'),
    ('memory://', 'memory://'),
])
def test_no_secret_is_shown(url: str, shown: str):
    assert public_url(url) == shown
