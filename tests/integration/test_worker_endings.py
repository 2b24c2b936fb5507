"""How an execution ends in a real worker decides what becomes of its instance."""

from __future__ import annotations

import pytest


class TestSuccess:
    def test_each_kind_of_result_becomes_the_kwargs_of_the_cascade(self, worker):
        """A mapping is taken as it is, None becomes {}, anything else {"result": value}."""
        uid = worker.fire('results', 'go')
        found = worker.settled(uid, count=6)
        assert {i.status for i in found.values()} == {'finished'}
        assert found['follow_mapping#0'].result == {
            'received': {'t_mapping': {'parcel': {'weight': 3}}}
        }
        assert found['follow_nothing#0'].result == {'received': {'t_nothing': {}}}
        assert found['follow_number#0'].result == {'received': {'t_number': {'result': 42}}}
        assert sorted(worker.lines(uid)) == ['mapping', 'nothing', 'number']

    def test_the_celery_result_is_the_unchanged_one(self, worker):
        uid = worker.fire('results', 'go')
        instance = worker.settled(uid, count=6)['t_number#0']
        assert instance.async_result.get(timeout=10) == 42
        assert instance.result == 42

    def test_every_status_leaves_a_timestamp(self, worker):
        uid = worker.fire('results', 'go')
        times = worker.settled(uid, count=6)['t_number#0'].timestamps
        order = ['unstarted', 'scheduled', 'running', 'finished']
        assert set(times) == set(order)
        assert [times[status] for status in order] == sorted(times.values())
        assert all(time.tzinfo is not None for time in times.values())


class TestFailure:
    def test_type_message_traceback_and_context_of_the_exception_are_kept(self, worker):
        uid = worker.fire('failures', 'raise')
        found = worker.settled(uid, count=2)
        failed = found['t_raises#0']
        assert failed.status == 'failed'
        assert failed.metadata['reason'] == 'raised'
        kept = failed.metadata['exception']
        assert (kept['type'], kept['message']) == ('ValueError', 'no such order')
        assert kept['context'] == {'order': 7}
        assert "raise with_context(ValueError('no such order')" in kept['traceback']

    def test_the_outcome_trigger_is_fired_once_instead_of_the_cascade(self, worker):
        uid = worker.fire('failures', 'raise')
        found = worker.settled(uid, count=2)
        assert found['t_apologize#0'].result == {
            'instance': 't_raises#0', 'reason': 'raised', 'type': 'ValueError',
            'message': 'no such order',
        }
        assert worker.fired(uid) == ['raise', 't_raises:failed', 't_apologize']
        assert sorted(worker.lines(uid)) == ['apologize', 'raises']

    @pytest.mark.parametrize(('kind', 'type_'), [('wrapper', 'ApiError'), ('base', 'BadGateway')])
    def test_an_exception_that_cannot_be_pickled_is_kept_as_it_was(self, worker, kind, type_):
        """Celery itself replaces it by a wrapper, or by one of a base class."""
        uid = worker.fire('failures', 'unpicklable', {'kind': kind})
        kept = worker.settled(uid)['t_unpicklable#0'].metadata['exception']
        assert (kept['type'], kept['message']) == (type_, '502: bad gateway')
        assert kept['context'] == {'order': 7}
        assert 'raise with_context(kind' in kept['traceback']

    def test_facts_that_cannot_be_serialized_are_kept_as_their_repr(self, worker):
        uid = worker.fire('failures', 'unstorable facts')
        found = worker.settled(uid, count=3)
        assert found['t_strange_failure#0'].status == 'failed'
        context = found['t_strange_failure#0'].metadata['exception']['context']
        assert context['order'] == 7
        assert context['lock'].startswith('<unlocked')
        for name, status in (('t_strange_skip#0', 'skipped'), ('t_strange_replay#0', 'replayed')):
            assert found[name].status == status
            assert found[name].metadata['lock'].startswith('<unlocked')

    def test_a_result_that_cannot_be_serialized_fails_the_instance(self, worker):
        failed = worker.settled(worker.fire('failures', 'unstorable'))['t_unstorable#0']
        assert failed.status == 'failed'
        assert failed.async_result.state == 'FAILURE'

    def test_a_content_type_that_no_worker_accepts_fails_the_instance(self, worker):
        uid = worker.fire('failures', 'yaml')
        failed = worker.settled(uid)['t_in_yaml#0']
        assert (failed.status, failed.metadata['reason']) == ('failed', 'rejected')
        assert 'yaml' in failed.metadata['exception']['message']
        assert worker.lines(uid) == []

    def test_a_follower_that_no_worker_knows_fails_alone_and_its_sibling_runs(self, worker):
        uid = worker.fire('failures', 'ghost')
        found = worker.settled(uid, count=3)
        ghost = found['t_ghost#0']
        assert (ghost.status, ghost.metadata['reason']) == ('failed', 'not registered')
        assert ghost.metadata['exception']['type'] == 'NotRegistered'
        assert found['t_first#0'].status == 'finished'
        assert found['t_sibling#0'].status == 'finished'
        assert worker.fired(uid).count('t_ghost:failed') == 1

    @pytest.mark.parametrize('trigger', ['kill', 'kill late'])
    def test_a_killed_child_fails_the_instance_as_lost(self, worker, trigger):
        """With the flags that Celery has by default; with acks_late when not requeued."""
        uid = worker.fire('failures', trigger)
        (failed,) = worker.settled(uid).values()
        assert (failed.status, failed.metadata['reason']) == ('failed', 'worker lost')
        assert failed.metadata['exception']['type'] == 'WorkerLostError'
        worker.barrier()
        assert worker.fired(uid) == [trigger, f'{failed.task}:failed']
        assert worker.lines(uid) == ['killed']


    def test_a_killed_child_of_a_task_that_acknowledges_late_is_run_again(self, worker):
        """Trigger tasks default to reject_on_worker_lost; it is the same attempt."""
        uid = worker.fire('failures', 'kill once')
        instance = worker.settled(uid)['t_killed_once#0']
        assert (instance.status, instance.attempt) == ('finished', 0)
        assert instance.result == {'runs': 2}
        worker.barrier()
        assert worker.fired(uid) == ['kill once', 't_killed_once']


class TestTimeLimits:
    def test_a_soft_time_limit_fails_the_instance_unless_its_code_catches_it(self, worker):
        found = worker.settled(worker.fire('failures', 'soft'), count=2)
        slow, tidy = found['t_slow#0'], found['t_tidy#0']
        assert (slow.status, slow.metadata['reason']) == ('failed', 'raised')
        assert slow.metadata['exception']['type'] == 'SoftTimeLimitExceeded'
        assert (tidy.status, tidy.result) == ('finished', {'tidied': True})

    def test_a_hard_time_limit_fails_the_instance_once(self, worker):
        """Celery signals it twice."""
        uid = worker.fire('failures', 'hard')
        failed = worker.settled(uid)['t_endless#0']
        assert (failed.status, failed.metadata['reason']) == ('failed', 'time limit')
        assert failed.metadata['exception']['type'] == 'TimeLimitExceeded'
        signals = f'task_failure {failed.task_id}'
        worker.wait_for(lambda: len(worker.lines(signals)) == 2, 'Celery has signalled twice')
        worker.barrier()
        assert worker.fired(uid) == ['hard', 't_endless:failed']
        assert worker.lines(uid) == ['endless']


class TestRetry:
    def test_a_retry_at_once_keeps_the_instance_and_counts_attempts(self, worker):
        uid = worker.fire('retries', 'at once', {'amount': 99})
        found = worker.settled(uid)
        assert list(found) == ['t_at_once#0']
        instance = found['t_at_once#0']
        assert (instance.status, instance.attempt) == ('finished', 2)
        assert instance.result == {'paid': 99}
        assert worker.lines(uid) == ['attempt 0 0', 'attempt 1 1', 'attempt 2 2']
        assert worker.fired(uid) == ['at once', 't_at_once']

    def test_a_retry_does_not_run_before_its_countdown(self, worker):
        uid = worker.fire('retries', 'later')
        instance = worker.settled(uid)['t_later#0']
        assert (instance.status, instance.attempt) == ('finished', 1)
        times = {words[0]: float(words[1]) for words in map(str.split, worker.lines(uid))
                 if words[0] in ('asked', 'ran')}
        assert times['ran'] >= times['asked'] + 0.9
        assert worker.fired(uid) == ['later', 't_later']

    @pytest.mark.parametrize('kind', ['aware', 'naive', 'text'])
    def test_a_retry_takes_the_dates_that_celery_takes(self, worker, kind):
        uid = worker.fire('retries', 'dated', {'as': kind})
        found = worker.settled(uid)['t_dated#0']
        assert (str(found.status), found.attempt) == ('finished', 1)
        assert found.log_level_name == 'WARNING', 'the highest of all attempts'

    def test_autoretry_for_counts_attempts_and_has_one_outcome(self, worker):
        uid = worker.fire('retries', 'automatic')
        instance = worker.settled(uid)['t_automatic#0']
        assert (instance.status, instance.attempt) == ('finished', 3)
        assert len(worker.lines(uid)) == 4
        assert worker.fired(uid) == ['automatic', 't_automatic']

    def test_a_retry_beyond_max_retries_fails_the_instance(self, worker):
        uid = worker.fire('retries', 'too often')
        instance = worker.settled(uid)['t_too_often#0']
        assert (instance.status, instance.attempt) == ('failed', 1)
        assert instance.metadata['exception']['message'] == 'still nothing'
        assert worker.lines(uid) == ['attempt 0 0', 'attempt 1 1']
        assert worker.fired(uid) == ['too often', 't_too_often:failed']

    @pytest.mark.parametrize(
        ('trigger', 'task'),
        [('requeue late', 't_requeueLate'), ('requeue early', 't_requeueEarly')],
    )
    def test_a_requeued_attempt_is_the_same_attempt(self, worker, trigger, task):
        """Reject(requeue=True), with acks_late and without."""
        uid = worker.fire('retries', trigger)
        instance = worker.settled(uid)[f'{task}#0']
        assert (instance.status, instance.attempt) == ('finished', 0)
        assert worker.lines(uid) == ['ran'] * 3
        assert worker.fired(uid) == [trigger, task]

    @pytest.mark.parametrize('trigger', ['reject', 'reject late'])
    def test_a_rejected_message_fails_the_instance_once(self, worker, trigger):
        uid = worker.fire('retries', trigger)
        (instance,) = worker.settled(uid).values()
        assert (instance.status, instance.metadata['reason']) == ('failed', 'rejected')
        worker.barrier()
        assert worker.fired(uid) == [trigger, f'{instance.task}:failed']


class TestControl:
    def test_a_revoked_task_that_has_not_started_never_runs(self, worker):
        uid = worker.fire('control', 'park')
        instance = worker.storage(uid)['t_park#0']
        (message,) = worker.parked_messages()
        worker.app.control.revoke(instance.task_id, destination=[worker.node])
        worker.wait_for(lambda: instance.task_id in worker.revoked(), 'the worker knows')
        worker.publish(message)
        revoked = worker.settled(uid)['t_park#0']
        assert (revoked.status, revoked.metadata['reason']) == ('revoked', 'revoked')
        assert worker.fired(uid) == ['park', 't_park:revoked']
        assert worker.lines(uid) == []

    def test_a_running_task_that_is_terminated_is_revoked(self, worker):
        uid = worker.fire('control', 'sleep')
        worker.wait_for(lambda: worker.lines(uid), 'the task has started')
        task_id = worker.storage(uid)['t_sleep#0'].task_id
        worker.app.control.revoke(task_id, terminate=True, destination=[worker.node])
        revoked = worker.settled(uid)['t_sleep#0']
        assert (revoked.status, revoked.metadata['reason']) == ('revoked', 'terminated')
        worker.barrier()
        assert worker.fired(uid) == ['sleep', 't_sleep:revoked']

    def test_a_message_that_expires_before_it_runs_fails_the_instance(self, worker):
        uid = worker.fire('control', 'perish')
        expired = worker.status(uid, 't_perish#1', 'failed')
        assert expired.metadata['reason'] == 'expired'
        assert worker.lines(uid) == ['perish']
        assert worker.fired(uid) == ['perish', 't_perish:failed']

    def test_ignore_skips_the_instance_and_nobody_waits_for_ever(self, worker):
        uid = worker.fire('control', 'ignore')
        skipped = worker.settled(uid)['t_ignore#0']
        assert skipped.status == 'skipped'
        assert skipped.async_result.get(timeout=10) is None
        assert worker.fired(uid) == ['ignore']

    def test_skip_keeps_its_metadata_and_fires_nothing(self, worker):
        uid = worker.fire('control', 'skip')
        found = worker.settled(uid)
        assert list(found) == ['t_skip#0']
        assert found['t_skip#0'].status == 'skipped'
        assert found['t_skip#0'].metadata['because'] == 'closed'
        assert found['t_skip#0'].async_result.get(timeout=10) is None

    def test_replay_puts_a_new_instance_in_the_place_of_this_one(self, worker):
        uid = worker.fire('control', 'replay', {'amount': -1})
        found = worker.settled(uid, count=2)
        old, new = found['t_replay#0'], found['t_replay#1']
        assert old.status == 'replayed'
        assert old.metadata['by'] == 'code'
        assert old.metadata['exception']['message'] == 'negative'
        assert old.async_result.get(timeout=10) is None
        assert (new.status, new.depth, new.metadata['parent']) == ('finished', 1, 't_replay#0')
        assert new.result == {'amount': 1}
        assert new.task_id != old.task_id
        assert worker.fired(uid) == ['replay', 't_replay']

    def test_a_replay_does_not_run_before_its_countdown(self, worker):
        uid = worker.fire('control', 'replay', {'amount': -1, 'countdown': 1})
        found = worker.settled(uid, count=2)
        times = found['t_replay#1'].timestamps
        assert (times['running'] - times['scheduled']).total_seconds() >= 0.9

    def test_a_replay_with_what_cannot_be_stored_fails_the_instance(self, worker):
        found = worker.settled(worker.fire('control', 'replay wrongly'))
        assert list(found) == ['t_replay_wrongly#0']
        assert found['t_replay_wrongly#0'].metadata['exception']['type'] == 'InvalidFiring'

    def test_a_replay_beyond_max_retries_fails_with_what_it_was_given(self, worker):
        uid = worker.fire('control', 'replay for ever')
        found = worker.settled(uid, count=3)
        assert [i.status for i in found.values()] == ['replayed', 'replayed', 'failed']
        last = found['t_replay_for_ever#2']
        assert last.metadata['exception']['message'] == 'not yet'
        assert worker.lines(uid) == ['run'] * 3
        assert worker.fired(uid) == ['replay for ever', 't_replay_for_ever:failed']


class TestReplacement:
    @pytest.mark.parametrize(
        ('by', 'result'),
        [
            ('task', {'total': 2}),
            ('chain', {'total': 3}),
            ('chord', {'total': 6}),
            ('group', {'result': [2, 4]}),
            ('retrying task', {'total': 2}),
            ('replaced task', {'total': 6}),
        ],
    )
    def test_the_outcome_of_the_replacement_is_that_of_the_instance(self, worker, by, result):
        uid = worker.fire('replacements', 'replace', {'by': by})
        found = worker.settled(uid, count=2)
        assert found['t_replace#0'].status == 'finished'
        assert found['t_after_replace#0'].result == result
        assert worker.lines(uid) == ['replace', 'after_replace']
        assert worker.fired(uid) == ['replace', 't_replace', 't_after_replace']

    @pytest.mark.parametrize(
        'by',
        ['broken task', 'broken foreign task', 'broken chain', 'chain broken at its end',
         'broken chord', 'chord with broken body'],
    )
    def test_a_replacement_that_fails_fails_the_instance_once(self, worker, by):
        uid = worker.fire('replacements', 'replace', {'by': by})
        found = worker.settled(uid)
        failed = found['t_replace#0']
        assert (failed.status, failed.metadata['reason']) == ('failed', 'raised')
        assert 'broken' in failed.metadata['exception']['message']
        worker.barrier()
        assert worker.fired(uid) == ['replace', 't_replace:failed']
