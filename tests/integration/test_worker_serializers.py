"""Each serializer that Celery ships, for messages, results and stored payloads alike."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal

import pytest

from tests.parts.servers import BROKER_DB, redis_url

PAYLOAD = {'text': 'grüße €', 'number': 1.5, 'list': [1, None, True], 'nested': {'a': {'b': []}}}


@pytest.mark.parametrize('serializer', ['json', 'yaml', 'msgpack', 'pickle'])
def test_a_serializer_serves_messages_results_and_storage(redis_server, start_worker, serializer):
    worker = start_worker(
        redis_url(BROKER_DB), '--pool', 'prefork', '--concurrency', '1',
        task_serializer=serializer, result_serializer=serializer, triggers_serializer=serializer,
        accept_content=[serializer, 'json'], result_accept_content=[serializer, 'json'],
    )
    try:
        payload = dict(PAYLOAD)
        if serializer != 'msgpack':
            payload['at'] = datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
        uid = worker.fire('replacements', 'replace', {'by': 'task', **payload})
        found = worker.settled(uid, count=2)
        assert found['t_replace#0'].kwargs['replace'] == {'by': 'task', **payload}
        assert found['t_replace#0'].status == 'finished'
        assert found['t_after_replace#0'].result == {'total': 2}
        assert found['t_after_replace#0'].async_result.get(timeout=10) == {'total': 2}
        again = worker.fire('retries', 'at once', payload | {'amount': 1})
        assert worker.settled(again)['t_at_once#0'].result == {'paid': 1}
    finally:
        worker.stop()


@pytest.mark.parametrize('serializer', ['yaml', 'msgpack'])
def test_a_message_serializer_that_takes_less_than_the_storage_does_no_harm(
    redis_server, start_worker, serializer
):
    """The kwargs are in the storage: where the message cannot carry them, they are read there."""
    worker = start_worker(
        redis_url(BROKER_DB), '--pool', 'solo', task_serializer=serializer,
        accept_content=[serializer, 'json'],
    )
    try:
        odd = {'price': Decimal('9.99'), 'big': 2**70}
        uid = worker.fire('context', 'count', {**odd, 'limit': '3'})
        found = worker.settled(uid)['t_count#0']
        assert str(found.status) == 'finished'
        assert found.kwargs['count'] == {**odd, 'limit': '3'}
    finally:
        worker.stop()
