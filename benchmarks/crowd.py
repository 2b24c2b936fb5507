"""Many processes that fire into one session at once."""

from __future__ import annotations

import multiprocessing
import time
import uuid
from typing import Any

from benchmarks.shop import make_app

FIRINGS = 3200


def _run(uid: str, count: int, start: Any) -> None:
    fire = make_app().triggers.fire
    fire(f'big:{uuid.uuid4()}', 'd', {})
    start.wait()
    for n in range(count):
        fire(uid, 'd', {'n': n})


def rate(processes: int) -> float:
    """Return how many firings a second so many processes apply to one session."""
    context = multiprocessing.get_context('spawn')
    start = context.Barrier(processes + 1)
    uid = f'big:{uuid.uuid4()}'
    crowd = [
        context.Process(target=_run, args=(uid, FIRINGS // processes, start))
        for _ in range(processes)
    ]
    for process in crowd:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in crowd:
        process.join()
    return FIRINGS / (time.perf_counter() - began)
