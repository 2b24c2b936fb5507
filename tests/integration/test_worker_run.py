"""Trigger tasks that run a signature, or a whole canvas, in real workers."""

from __future__ import annotations

from typing import Any

import pytest

from celery_triggers.engine.step import cascade_kwargs

#: What is run for ``{"v": 5}``, and its result. Each waits for its own name.
RESULTS = {
    'plain': {'args': [1, 5], 'kwargs': {'x': [{'y': 5}]}},
    'json': 6,
    'chain': 8,
    'group': [6, 7],
    'chord': 10,
}
#: The same, with a gate inside that waits for ``more``, fired with ``{"v": 10}``.
GATED = {'gated': 17, 'gated_last': 7, 'gated_chord': 10}
#: What fails, and the exception. That of a chord names the one of its member.
FAILURES = {
    'broken_chain': ('LookupError', 'broken'),
    'broken_group': ('ChordError', "LookupError('broken')"),
    'broken_chord': ('ChordError', "LookupError('broken')"),
    'broken_body': ('LookupError', 'broken'),
    'broken_gate': ('LookupError', 'broken'),
    'abandoned_gate': ('GateAbandoned', 'unless: more'),
    'without_value': ('TriggersError', "'other' of 'without_value'"),
}


def run(worker: Any, name: str) -> str:
    """Fire what runs it; return the uid."""
    uid: str = worker.fire('runs', name, {'v': 5})
    return uid


@pytest.mark.parametrize('name', RESULTS)
def test_the_instance_ends_as_the_whole_ends(worker, name):
    uid = run(worker, name)
    finished = worker.status(uid, f't_{name}#0', 'finished')
    assert finished.async_result.get(timeout=20) == RESULTS[name]
    assert worker.storage(uid).latest_kwargs[f't_{name}'] == cascade_kwargs(RESULTS[name])
    worker.barrier()
    assert worker.fired(uid) == [name, f't_{name}']


@pytest.mark.parametrize('name', GATED)
def test_a_gate_inside_waits_in_the_same_session(worker, name):
    uid = run(worker, name)
    worker.wait_for(
        lambda: [i for i in worker.storage(uid) if i.status == 'unstarted'], 'the gate waits'
    )
    assert worker.storage(uid)[f't_{name}#0'].status == 'running'
    worker.app.triggers.fire(uid, 'more', {'v': 10})
    finished = worker.status(uid, f't_{name}#0', 'finished')
    assert finished.async_result.get(timeout=20) == GATED[name]
    assert worker.storage(uid).latest_kwargs[f't_{name}'] == {'result': GATED[name]}
    assert worker.fired(uid).count(f't_{name}') == 1


@pytest.mark.parametrize('name', FAILURES)
def test_a_member_that_fails_fails_the_instance(worker, name):
    uid = run(worker, name)
    if name.endswith('_gate'):
        worker.wait_for(
            lambda: [i for i in worker.storage(uid) if i.status == 'unstarted'], 'the gate waits'
        )
        worker.app.triggers.fire(uid, 'more')
    failed = worker.status(uid, f't_{name}#0', 'failed')
    type_, words = FAILURES[name]
    assert failed.metadata['exception']['type'] == type_
    assert words in failed.metadata['exception']['message']
    worker.barrier()
    assert worker.fired(uid).count(f't_{name}:failed') == 1
    assert f't_{name}' not in worker.fired(uid)


def test_a_trigger_task_in_code_receives_its_context_and_its_own_arguments(worker):
    uid = run(worker, 'code')
    assert worker.status(uid, 't_code#0', 'finished').result == {
        'uid': uid, 'fired': {'code': {'v': 5}}, 'previous': ['own'], 'kwargs': {'x': 5},
    }


def test_the_options_of_a_signature_reach_its_message(worker):
    uid = run(worker, 'queued')
    found = worker.status(uid, 't_queued#0', 'finished').result
    assert (found['queue'], found['priority']) == (f'{worker.name}-other', 3)


def test_what_failed_is_replayed_as_a_whole(worker):
    uid = run(worker, 'without_value')
    failed = worker.status(uid, 't_without_value#0', 'failed')
    worker.app.triggers.session(uid).replay_failed_instance(
        failed, {'without_value': {'other': 3}}
    )
    replayed = worker.status(uid, 't_without_value#1', 'finished')
    assert replayed.async_result.get(timeout=20) == 5
