"""Answers that are lost or late, and refusals: what is repeated, and what an error tells."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.testing.conformance.support import fired
from celery_triggers.testing.media import Medium
from tests.redis.support import EACH, client_of


class Spoilt:
    """Answers of a node that get lost on their way; they are carried out all the same.

    Args:
        errors: What comes instead of the first answers.
    """

    def __init__(self, medium: Medium, monkeypatch: pytest.MonkeyPatch, *errors: Exception):
        client = client_of(medium)
        self._real, self._errors = client._exchange, list(errors)
        self.sent = 0
        monkeypatch.setattr(client, '_exchange', self)

    def __call__(self, client: Any, commands: Any, asking: bool = False) -> Any:
        found = self._real(client, commands, asking)
        if any(command[0] == 'CLUSTER SLOTS' for command in commands):
            return found
        self.sent += 1
        if self._errors:
            error = self._errors.pop(0)
            if error is not None:
                raise error
        return found


LOST = redis.exceptions.ConnectionError('the answer was lost')
LATE = redis.exceptions.TimeoutError('no answer in time')


@pytest.fixture(params=['cluster_medium', 'sentinel_medium'])
def medium(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def manager(medium: Medium) -> Any:
    found = medium.manager(EACH)
    found.fire('a')
    return found


def test_a_lost_answer_is_asked_for_again_and_nothing_is_doubled(
    medium: Medium, manager: Any, monkeypatch: pytest.MonkeyPatch
):
    # The read and the commit, each once more.
    spoilt = Spoilt(medium, monkeypatch, LOST, None, LOST)
    assert manager.fire('a').released == ['t_each#1']
    assert spoilt.sent == 4
    assert fired(manager) == ['a', 'a']


@pytest.mark.parametrize(
    ('errors', 'sent'), [([None, LOST, LOST], 3), ([None, LATE], 2), ([None, LOST, LATE], 3)]
)
def test_a_commit_without_an_answer_may_have_happened(
    medium: Medium, manager: Any, monkeypatch: pytest.MonkeyPatch,
    errors: list[Any], sent: int,
):
    spoilt = Spoilt(medium, monkeypatch, *errors)
    with pytest.raises(StorageUnavailable) as caught:
        manager.fire('a', event_id='e')
    assert caught.value.outcome_unknown
    assert spoilt.sent == sent
    assert manager.fire('a', event_id='e').duplicate


@pytest.mark.parametrize(
    'refusal',
    [
        redis.exceptions.ReadOnlyError('no'), redis.exceptions.OutOfMemoryError('no'),
        redis.exceptions.ResponseError('NOREPLICAS no'),
    ],
)
@pytest.mark.parametrize('lost', [False, True])
def test_a_refusal_tells_that_nothing_happened_unless_an_answer_was_lost_before(
    medium: Medium, manager: Any, monkeypatch: pytest.MonkeyPatch,
    refusal: Exception, lost: bool,
):
    client = client_of(medium)
    real, answers = client._exchange, [None, *([LOST] if lost else []), [refusal]]

    def exchange(*args: Any) -> Any:
        answer = answers.pop(0) if answers else None
        if isinstance(answer, list):
            return answer
        found = real(*args)
        if answer is not None:
            raise answer
        return found

    monkeypatch.setattr(client, '_exchange', exchange)
    with pytest.raises(StorageUnavailable, match='refused') as caught:
        manager.fire('a', event_id='e')
    assert caught.value.outcome_unknown is lost
    assert manager.fire('a', event_id='e').duplicate is lost
