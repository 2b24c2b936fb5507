"""A workflow as applications have it, fired from several processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from integration_support import HERE, eventually
from questionnaire_firing import PAGES

PROCESSES = 4
SESSIONS = 200


def test_every_session_ends_right_and_nothing_runs_twice(worker):
    """Each page is imported once, after the subject; embedded applications have no browser."""
    prefix = f'{worker.uid("questionnaire")}-'
    uids = [f'{prefix}{number}' for number in range(SESSIONS)]
    embedded = set(uids[::3])
    for uid in embedded:
        worker.app.triggers.session(uid, manager='finalizing').fire('isEmbeddedApplication')
    processes = [
        subprocess.Popen(
            [sys.executable, 'questionnaire_firing.py', str(number), str(PROCESSES), prefix,
             str(SESSIONS)],
            cwd=HERE, env=worker.environment,
        )
        for number in range(PROCESSES)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0] * PROCESSES
    finally:
        for process in processes:
            process.kill()

    def complete():
        done = {line.split()[0] for line in worker.lines('questionnaire') if 't_markC' in line}
        return len(done) >= SESSIONS

    eventually(complete, 'every session is complete', timeout=120)
    for uid in uids:
        found = worker.settled(uid, count=3 + len(PAGES))
        assert {name: str(instance.status) for name, instance in found.items()} == {
            't_importSubject#0': 'finished',
            **{f't_importResponses#{n}': 'finished' for n in range(len(PAGES))},
            't_importBrowserMetadata#0': 'abandoned' if uid in embedded else 'finished',
            't_markComplete#0': 'finished',
        }
        assert sorted(worker.lines(uid)) == [f'page {page}' for page in PAGES]
        assert worker.fired(uid).count('sessionFinalized') == 1
    ran = Counter(worker.lines('questionnaire'))
    assert set(ran.values()) == {1}
    assert len(ran) == SESSIONS * (2 + len(PAGES)) + SESSIONS - len(embedded)
