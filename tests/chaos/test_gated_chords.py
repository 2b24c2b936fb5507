"""Chords whose header tasks and whose body wait at gates, many of them at a time."""

from __future__ import annotations

import gc
import os
import random
import threading
from typing import Any

from celery import chord

from celery_triggers import gate, kwarg
from celery_triggers.engine.transitions import Status
from tests.chaos.arena import Arena
from tests.chaos.beside import beside
from tests.chaos.checks import everything
from tests.chaos.conftest import LONG
from tests.chaos.places import wait_for
from tests.chaos.test_situations import check, each_ran_once

COUNT = 500 if LONG else 25

#: A child that dies while it hands the chord's body on keeps Celery's own claim to do so for
#: some seconds, which depend on these settings. A lease must be longer.
LEASE = 12.0
CLAIM = {'result_chord_join_timeout': 1.0, 'broker_connection_timeout': 1.0}

LEAST_KILLS = 5

TRIGGERS = ('go 1', 'go 2', 'go 3', 'open')


def apply_chord(arena: Arena, uid: str) -> str:
    """Apply a chord of three gated tasks and a gated body; return the body's task id."""
    part, body = arena.app.tasks['gates_late.part'], arena.app.tasks['gates_late.body']
    header = [
        gate(part.s(number, kwarg(f'go {number}', 'plan')), after=[f'go {number}'], uid=uid,
             trigger_name='t_part')
        for number in (1, 2, 3)
    ]
    gated = gate(body.s(kwarg('open', 'plan')), after=['open'], uid=uid, trigger_name='t_body')
    return str(chord(header)(gated).id)


def jobs_of(arena: Arena, uid: str, chance: random.Random) -> list[dict[str, Any]]:
    """Return the firings that release all of it, in some order."""
    triggers = list(TRIGGERS)
    chance.shuffle(triggers)
    seconds = {'seconds': chance.choice((0, 0, 0, 0.05))}
    return [arena.job(uid, trigger, {'plan': seconds}) for trigger in triggers]


def run_all(arena: Arena, chance: random.Random) -> dict[str, str]:
    """Apply chords and fire, all mixed; return the task ids of their bodies by uid."""
    uids = [arena.uid('gates-late') for _ in range(COUNT)]
    fired = {uid: jobs_of(arena, uid, chance) for uid in uids}
    # Some of what they wait for comes before they do.
    early = [job for uid in uids for job in fired[uid][: chance.randrange(3)]]
    late = [job for uid in uids for job in fired[uid] if job not in early]
    chance.shuffle(late)
    arena.fire_until_acknowledged(*early)
    results: dict[str, str] = {}
    applying = threading.Thread(
        target=lambda: results.update({uid: apply_chord(arena, uid) for uid in uids})
    )
    applying.start()
    for start in range(0, len(late), 25):
        arena.fire_until_acknowledged(*late[start : start + 25])
    applying.join()
    # Results that are given up later would look for a server that has ended.
    gc.collect()
    return results


def all_joined(arena: Arena, results: dict[str, str]) -> None:
    """Wait until each body has run once with what its three header tasks returned."""

    def ended() -> bool:
        left = [uid for uid in results if not is_joined(arena, uid)]
        return not left

    try:
        wait_for(ended, 'every chord has ended', 120 + COUNT)
    except AssertionError as exc:
        left = [uid for uid in results if not is_joined(arena, uid)]
        raise AssertionError(f'{exc}: {len(left)}\n{arena.describe(left[:5])}') from None
    for uid, task_id in results.items():
        meta = arena.app.backend.get_task_meta(task_id, cache=False)
        assert (meta['status'], meta['result']) == ('SUCCESS', 6)
        assert arena.storage(uid)['t_body#0'].result == 6


def is_joined(arena: Arena, uid: str) -> bool:
    statuses = [i.status for i in arena.instances(uid).values()]
    return len(statuses) == 4 and set(statuses) == {Status.FINISHED}


@beside
def test_gated_chords_join_once(make_arena):
    arena = make_arena(triggers_redeliver_after=600, result_chord_expires=0)
    arena.keep_workers(2, '--concurrency', '2')
    results = run_all(arena, random.Random(1))
    all_joined(arena, results)
    check(arena, *results)
    each_ran_once(arena)


@beside
def test_gated_chords_join_once_while_workers_are_killed(make_arena):
    arena = make_arena(
        triggers_lease=LEASE, result_chord_expires=0, **CLAIM
    )
    kept = arena.keep_workers(3, '--concurrency', '2')
    stopped = threading.Event()
    chance = random.Random(int(os.environ.get('TRIGGERS_CHAOS_SEED', '2')))
    killing = threading.Thread(target=kill_now_and_then, args=(arena, kept, chance, stopped))
    killing.start()
    try:
        results = run_all(arena, random.Random(3))
    finally:
        stopped.set()
        killing.join()
    all_joined(arena, results)
    wait_for(lambda: not arena.dues(), 'the index of due dates is empty')
    wrong = everything(arena, results)
    assert not wrong, '\n'.join(wrong)
    assert len(arena.journal.read('kills')) >= LEAST_KILLS


def kill_now_and_then(
    arena: Arena, kept: Any, chance: random.Random, stopped: threading.Event
) -> None:
    """Kill workers, and children of workers, until told to stop and some are dead."""
    number = 0
    while not stopped.wait(chance.uniform(0.2, 0.8)) or number < LEAST_KILLS:
        number += 1
        parent = chance.choice(kept.pids)
        children = arena.nursery.children_of(parent)
        if children and chance.random() < 0.7:
            child = chance.choice(children)
            arena.journal.write(
                'kills', target=child, uids=[], role='child', point='any', key='', do='kill'
            )
            arena.nursery.kill_child(parent, child)
        else:
            arena.kill(parent, role='parent')
