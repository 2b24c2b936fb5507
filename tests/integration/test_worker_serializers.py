"""Each serializer that Celery ships, for messages, results and stored payloads alike."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.servers import BROKER_DB, redis_url

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
