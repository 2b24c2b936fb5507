"""Messages that come twice, late or from somebody else."""

from __future__ import annotations

import pytest

from celery_triggers.exceptions import UnknownKey


def header_of(message):
    return message[1]['triggers']


class TestDoubledDeliveries:
    def test_the_very_same_message_twice_at_once_runs_once(self, worker):
        uid = worker.fire('control', 'park', {'seconds': 0.5})
        (message,) = worker.parked_messages()
        worker.publish(message)
        worker.publish(message)
        assert worker.settled(uid)['t_park#0'].status == 'finished'
        worker.barrier()
        assert worker.lines(uid) == ['park']
        assert worker.fired(uid) == ['park', 't_park']

    def test_a_message_that_comes_again_after_the_end_changes_nothing(self, worker):
        uid = worker.fire('control', 'park')
        (message,) = worker.parked_messages()
        worker.publish(message)
        first = worker.settled(uid)['t_park#0']
        worker.publish(message)
        worker.barrier()
        again = worker.storage(uid)['t_park#0']
        assert worker.lines(uid) == ['park']
        assert (again.status, again.last_modified) == ('finished', first.last_modified)
        assert again.async_result.get(timeout=10) == {'ran': True}

    def test_a_task_that_tracks_its_start_keeps_its_result(self, worker):
        """A doubled delivery does not turn SUCCESS back into STARTED."""
        uid = worker.fire('control', 'park', {'seconds': 1})
        (message,) = worker.parked_messages()
        worker.publish(message)
        result = worker.storage(uid)['t_park#0'].async_result
        worker.wait_for(lambda: result.state == 'STARTED', 'the start is stored')
        assert result.get(timeout=20) == {'ran': True}
        worker.publish(message)
        worker.barrier()
        assert result.state == 'SUCCESS'

    def test_a_message_of_a_deleted_session_runs_nothing(self, worker):
        uid = worker.fire('control', 'park')
        (message,) = worker.parked_messages()
        assert worker.app.triggers.delete(uid)
        worker.publish(message)
        worker.barrier()
        assert worker.lines(uid) == []
        assert not worker.storage(uid).exists

    def test_a_message_of_an_earlier_incarnation_runs_nothing(self, worker):
        """Of a deleted session nothing runs, also where a new one has its uid."""
        uid = worker.fire('control', 'park')
        (message,) = worker.parked_messages()
        worker.app.triggers.delete(uid)
        worker.app.triggers.fire(uid, 'park')
        (new,) = worker.parked_messages()
        assert header_of(new)['incarnation'] != header_of(message)['incarnation']
        worker.publish(message)
        worker.barrier()
        assert worker.storage(uid)['t_park#0'].status == 'scheduled'
        worker.publish(new)
        assert worker.settled(uid)['t_park#0'].status == 'finished'
        assert worker.lines(uid) == ['park']

    def test_a_before_start_of_ones_own_runs_after_the_claim_and_only_once(self, worker):
        uid = worker.fire('control', 'careful')
        (message,) = worker.parked_messages()
        worker.publish(message)
        assert worker.settled(uid)['t_careful#0'].status == 'finished'
        worker.publish(message)
        worker.barrier()
        assert worker.lines(uid) == ['before_start', 'careful']


class TestForgedHeaders:
    """A header is data that anybody can send."""

    @pytest.mark.parametrize(
        'forge',
        [
            {'manager': 'no such manager'},
            {'storage': 'no such storage'},
            {'storage': 'memory'},
            {'incarnation': 'another'},
            {'instance': 't_park#7'},
            {'instance': 'nonsense'},
            {'task_id': 'another'},
            {'attempt': 7},
            {'attempt': -1},
            {'attempt': '0'},
            {'attempt': None},
            {'attempt': True},
            {'uid': ''},
            {'uid': None},
            {'uid': 'control:another'},
            {'uid': {'nested': 1}},
            {'manager': ['default']},
            {'claim': {'forged': 1}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize('task', ['integration_app.park', 'plain', 'foreign', 'ghost'])
    def test_a_forged_header_changes_nothing(self, worker, task, forge):
        """Neither for a trigger task nor for a plain, a foreign or an unknown task."""
        self.check(worker, task, forge)

    @pytest.mark.parametrize(
        'missing', ['uid', 'incarnation', 'instance', 'task_id', 'attempt', 'manager', 'storage']
    )
    def test_a_header_without_one_of_its_keys_changes_nothing(self, worker, missing):
        self.check(worker, 'integration_app.park', {}, missing)

    def check(self, worker, task, forge, missing=None):
        uid = worker.fire('control', 'park')
        (message,) = worker.parked_messages()
        header = {**header_of(message), **forge}
        header.pop(missing, None)
        forged = {**message[1], 'triggers': header, 'task': task}
        worker.publish((message[0], forged, *message[2:]))
        worker.barrier()
        instance = worker.storage(uid)['t_park#0']
        assert (instance.status, instance.attempt) == ('scheduled', 0)
        assert worker.fired(uid) == ['park']
        assert worker.lines(uid) == []

    @pytest.mark.parametrize('header', [None, 'text', 7, [], {}], ids=repr)
    def test_a_header_that_is_no_mapping_is_nobodys(self, worker, header):
        done = worker.app.send_task('add', (1, 2), headers={'triggers': header})
        assert done.get(timeout=20) == 3

    def test_an_unknown_manager_is_an_error_that_lists_the_known_ones(self, worker):
        with pytest.raises(UnknownKey, match=r'known are: .*default, .*finalizing'):
            worker.app.triggers.session('any', manager='no such manager')
