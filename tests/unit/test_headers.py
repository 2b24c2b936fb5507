"""What a header of a message may be: anybody can send one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from celery_triggers.manager.header import HEADER_KEYS, header_in, is_header

HEADER: dict[str, Any] = {
    'uid': 'order:42', 'incarnation': 'i', 'instance': 't_ship#0', 'task_id': 't', 'attempt': 0,
    'manager': 'default', 'storage': 'redis',
}
MORE: dict[str, Any] = {'claim': 'token', 'depth': 1, 'gate': True, 'place': 'redis://h'}


def test_what_this_package_sends_is_a_header() -> None:
    assert is_header(HEADER)
    assert is_header({**HEADER, **MORE})
    assert is_header({**HEADER, 'uid': 'a {name}\nof two lines \N{SNOWMAN}'})


@pytest.mark.parametrize('key', sorted(HEADER_KEYS))
def test_what_lacks_a_member_is_none(key: str) -> None:
    assert not is_header({k: v for k, v in HEADER.items() if k != key})


@pytest.mark.parametrize('key', sorted({*HEADER, *MORE}))
@pytest.mark.parametrize('wrong', [5.5, None, ['x'], {'x': 1}, '\udce9', 'a\nERROR forged'])
def test_what_has_one_wrong_member_is_none(key: str, wrong: Any) -> None:
    if (key, wrong) == ('uid', 'a\nERROR forged'):
        pytest.skip('a session is called what the application likes')
    assert not is_header({**HEADER, **MORE, key: wrong})


@pytest.mark.parametrize('value', [None, 'x', 5, [], {}])
def test_what_is_no_mapping_of_it_is_none(value: Any) -> None:
    assert not is_header(value)


def test_it_is_found_wherever_celery_puts_it() -> None:
    assert header_in(SimpleNamespace(headers={'triggers': HEADER})) == HEADER
    assert header_in(SimpleNamespace(triggers=HEADER, headers={'x-trace': '1'})) == HEADER
    assert header_in(SimpleNamespace(triggers=HEADER, headers=None)) == HEADER
    assert header_in(SimpleNamespace(headers={'x-trace': '1'})) is None
    assert header_in(SimpleNamespace(headers=None)) is None
    assert header_in(None) is None
