"""What runs: tasks of every kind, their contexts, and the managers that serve them."""

from __future__ import annotations

import logging
import os
import threading

import integration_app
import pytest

from celery_triggers.exceptions import TriggersError
from celery_triggers.wiring import services_of


class TestKindsOfTasks:
    def test_a_plain_task_receives_no_kwargs_and_cascades(self, worker):
        """Also one whose base is not TriggerTask; current_context() works in both."""
        uid = worker.fire('kinds', 'go', {'amount': 3})
        found = worker.settled(uid, count=4)
        assert found['t_plain#0'].result == {'by': 't_plain#0'}
        assert found['t_foreign#0'].result == {'by': 't_foreign#0'}
        assert found['t_after_both#0'].result == {'plain': 't_plain#0', 'foreign': 't_foreign#0'}
        assert sorted(worker.lines(uid)) == ['foreign 3', 'plain 3']

    def test_a_task_that_is_no_trigger_task_can_fail(self, worker):
        uid = worker.fire('kinds', 'go', {'amount': 3})
        failed = worker.settled(uid, count=4)['t_foreignBroken#0']
        assert (failed.status, failed.metadata['exception']['type']) == ('failed', 'LookupError')

    def test_a_task_that_is_no_trigger_task_can_retry(self, worker):
        """Attempts are counted where the task makes claims."""
        uid = worker.fire('kinds', 'insist')
        found = worker.settled(uid, count=2)
        assert found['t_insistent#0'].result == {'total': 2}
        assert found['t_insistentForeign#0'].result == {'total': 2}
        assert found['t_insistent#0'].attempt == 2
        assert sorted(worker.fired(uid)) == ['insist', 't_insistent', 't_insistentForeign']

    def test_a_task_that_only_the_worker_knows_receives_what_its_kind_receives(self, worker):
        assert 'only_in_the_worker' not in worker.app.tasks
        uid = worker.fire('kinds', 'elsewhere', {'amount': 4})
        found = worker.settled(uid, count=3)
        assert {name: i.status for name, i in found.items()} == {
            't_elsewhere#0': 'finished',
            't_elsewherePlain#0': 'finished',
            't_elsewhereForeign#0': 'finished',
        }
        assert found['t_elsewhere#0'].result == {'amount': 4}
        assert sorted(worker.lines(uid)) == ['elsewhere 4', 'elsewhere foreign', 'elsewhere plain']

    def test_functions_bound_or_not_and_classes_are_trigger_tasks(self, worker):
        uid = worker.fire('kinds', 'decorated', {'amount': 5})
        found = worker.settled(uid, count=5)
        assert found['t_bound#0'].result == {'name': 'integration_app.bound', 'id': True}
        assert found['t_unbound#0'].result == {'uid': uid, 'amount': 5}
        assert found['t_inClass#0'].result == {'name': 'in_class', 'amount': 5}

    def test_task_objects_and_classes_stand_for_their_triggers_in_conditions(self, worker):
        uid = worker.fire('kinds', 'decorated', {'amount': 5})
        assert worker.settled(uid, count=5)['t_after_tasks#0'].result == {'amounts': [5, 5]}
        config = worker.app.triggers.workflow('kinds:').tasks['t_after_tasks']
        assert set(config.after) == {'t_inClass', 't_unbound'}

    def test_stacked_decorators_make_several_trigger_tasks_of_one_task(self, worker):
        uid = worker.fire('kinds', 'stacked a')
        assert worker.settled(uid)['t_stackedA#0'].result == {'by': 't_stackedA#0'}
        worker.app.triggers.fire(uid, 'stacked b')
        assert worker.settled(uid, count=2)['t_stackedB#0'].result == {'by': 't_stackedB#0'}
        tasks = worker.app.triggers.workflow('kinds:').tasks
        assert tasks['t_stackedA'].run == tasks['t_stackedB'].run == 'integration_app.stacked'

    def test_the_options_of_a_task_are_passed_on(self, worker):
        task = worker.app.tasks['with_options']
        assert task.max_retries == 7
        assert task.acks_late is True
        assert task.autoretry_for == (KeyError,)
        assert task.rate_limit == '100/s'
        assert task.serializer == 'json'
        uid = worker.fire('kinds', 'decorated', {'amount': 5})
        instance = worker.settled(uid, count=5)['t_with_options#0']
        assert instance.result == {'queue': f'{worker.name}-other'}

    def test_pydantic_models_that_a_task_returns_are_dumped(self, worker):
        uid = worker.fire('kinds', 'pydantic', {'weight': 6})
        instance = worker.settled(uid)['t_weighed#0']
        assert (instance.status, instance.result) == ('finished', {'weight': 6})

    def test_a_session_has_the_trigger_tasks_of_its_prefix_alone(self, worker):
        uid = worker.fire('kinds', 'stacked a')
        tasks = set(worker.storage(uid).tasks)
        assert tasks == set(worker.app.triggers.workflow('kinds:').tasks)
        assert 't_raises' not in tasks

    def test_a_trigger_task_that_is_sent_without_a_trigger_fails_with_advice(self, worker):
        sent = worker.app.tasks['integration_app.unbound'].delay(trigger_kwargs={})
        with pytest.raises(Exception, match='fire a trigger to run it'):
            sent.get(timeout=20)


class TestContext:
    def test_records_of_the_logger_context_reach_the_logger_of_the_task(self, worker):
        uid = worker.fire('context', 'log')
        instance = worker.settled(uid)['t_log#0']
        assert (instance.log_level, instance.log_level_name) == (logging.WARNING, 'WARNING')
        for level, text in (('INFO', 'information'), ('WARNING', 'a warning')):
            (line,) = [line for line in worker.log.splitlines() if f'{text} about {uid}' in line]
            assert level in line

    def test_logs_are_unresolved_until_somebody_marks_them(self, worker):
        uid = worker.fire('context', 'log')
        worker.settled(uid)
        session = worker.app.triggers.session(uid)
        (instance,) = session.storage.get_instances_with_unresolved_logs()
        session.mark_instance_logs_resolved(instance)
        assert session.storage.get_instances_with_unresolved_logs() == []
        assert session.storage['t_log#0'].logs_resolved

    def test_an_exception_in_the_logger_context_is_logged_and_goes_on(self, worker):
        uid = worker.fire('context', 'log error')
        failed = worker.settled(uid)['t_log_error#0']
        assert failed.status == 'failed'
        assert failed.metadata['exception']['context'] == {'page': 3}
        assert failed.log_level == logging.ERROR
        assert f'ValueError: an error about {uid}' in worker.log
        assert [i.name for i in worker.storage(uid).get_instances_with_unresolved_logs()] == [
            't_log_error#0'
        ]

    def test_what_a_task_fires_has_an_event_id_for_each_occurrence(self, worker):
        """Equal firings of one run are told apart; each is applied once."""
        uid = worker.fire('context', 'fire')
        found = worker.settled(uid, count=4)
        ids = found['t_fires#0'].result['ids']
        task_id = found['t_fires#0'].task_id
        assert len(set(ids)) == 3
        assert all(event_id.startswith(f't_fires#0:{task_id}:0:') for event_id in ids)
        assert sorted(worker.lines(uid)) == ['scan 1', 'scan 1', 'scan 2']

    def test_firings_and_filters_see_what_was_fired(self, worker):
        uid = worker.uid('context')
        for box in (1, 2, 3):
            worker.app.triggers.fire(uid, 'counted', {'box': box})
        worker.app.triggers.fire(uid, 'count', {'limit': '12'})
        assert worker.settled(uid)['t_count#0'].result == {
            'boxes': [1, 2, 3], 'filtered': {'count': {'limit': 12}},
        }


class TestManagers:
    def test_a_custom_manager_serves_the_cascades_in_the_worker_too(self, worker):
        """Its hook runs in the process that fired."""
        uid = worker.uid('managers')
        worker.app.triggers.session(uid, manager='noting').fire('go')
        worker.settled(uid, count=2)

        def hooks():
            return [line.split()[1:] for line in worker.lines(uid) if line.startswith('fired')]

        worker.wait_for(lambda: len(hooks()) == 3, 'hooks')
        # A hook comes after the sending, so the worker's may be called before this process's.
        fired = {trigger: (released, pid) for trigger, released, pid in hooks()}
        first, second = [line.split()[1] for line in worker.lines(uid) if line.startswith('link')]
        assert fired == {
            'go': ('t_first#0', str(os.getpid())),
            't_first': ('t_second#0', first),
            't_second': ('-', second),
        }

    def test_hooks_of_a_replay_and_of_a_skip_are_called_and_undo_nothing(self, worker):
        uid = worker.uid('failures')
        session = worker.app.triggers.session(uid, manager='noting')
        session.fire('raise')
        worker.settled(uid, count=2)
        session.replay_failed_instance('t_raises#0')
        worker.settled(uid, count=3)
        session.skip_failed_instance('t_raises#1', cascade=False)
        assert session.storage['t_raises#1'].status == 'skipped'
        assert 'replayed t_raises#1' in worker.lines(uid)
        assert 'skipped t_raises#1 False' in worker.lines(uid)

    def test_a_manager_that_is_not_registered_is_refused_at_its_first_fire(self, worker):
        uid = worker.uid('managers')
        manager = integration_app.UnregisteredManager(services_of(worker.app).storage(uid))
        with pytest.raises(TriggersError, match='UnregisteredManager is not registered'):
            manager.fire('go')
        assert not worker.storage(uid).exists

    def test_the_session_keeps_the_manager_that_it_began_with(self, worker):
        uid = worker.uid('finalizing')
        worker.app.triggers.session(uid, manager='finalizing').fire('go')
        worker.status(uid, 't_after_complete#0', 'finished')
        assert worker.fired(uid).count('sessionFinalized') == 1

    def test_a_session_is_finalized_once_by_8_threads_that_fire_at_once(self, worker):
        """Neither the follower of an outcome nor that of a finalized task holds it up."""
        uid = worker.uid('finalizing')
        start = threading.Barrier(8)

        def fire():
            start.wait()
            worker.app.triggers.session(uid, manager='finalizing').fire('go')

        threads = [threading.Thread(target=fire) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        worker.status(uid, 't_after_complete#0', 'finished')
        worker.wait_for(
            lambda: len(worker.storage(uid).instances_of_task('t_step')) == 8
            and not [i for i in worker.storage(uid) if i.status in ('scheduled', 'running')],
            'all have run',
        )
        fired = worker.fired(uid)
        assert fired.count('go') == 8
        assert fired.count('t_step') == 8
        assert fired.count('sessionFinalized') == 1
        assert sorted(worker.lines(uid)) == ['after_complete', 'complete', *['step'] * 8]
        assert worker.storage(uid).get_unresolved_instances() == []
