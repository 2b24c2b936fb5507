"""Processes that fire from several threads, and what came of it: acknowledged, refused, lost.

As a program: ``python -m tests.redis.storm URL PREFIX JOURNAL OPTIONS``, which fires until its
standard input ends, and then until each firing whose outcome it does not know is acknowledged.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Server
from tests.parts.waiting import eventually
from tests.redis.support import EACH

T = TypeVar('T')

ROOT = Path(__file__).resolve().parents[2]

SESSIONS = [f'order:{number}' for number in range(6)]

THREADS = 3

#: What became of a firing in the eyes of the process that made it.
ACKNOWLEDGED, UNKNOWN, REFUSED = 'acknowledged', 'unknown', 'refused'


def medium_of(url: str, prefix: str, options: dict[str, Any]) -> Medium:
    return Medium(
        'redis', url, prefix=prefix, settings={'triggers_storage_options': options},
    )


# ------------------------------------------------------------------- in the process


class Firing:
    """A thread that fires, each time with another event id."""

    def __init__(self, medium: Medium, journal: Any, stop: threading.Event, number: int):
        self.application = medium.application(EACH)
        self.managers = [medium.manager(self.application, uid) for uid in SESSIONS]
        self.journal, self.stop, self.name = journal, stop, f'{os.getpid()}-{number}'

    def run(self) -> None:
        count = 0
        while not self.stop.is_set():
            manager = self.managers[count % len(self.managers)]
            count += 1
            self.fire(manager, f'{manager.uid} {self.name}-{count}')
            self.application.releases.clear()

    def fire(self, manager: Any, event: str) -> None:
        outcome = ''
        while outcome != ACKNOWLEDGED:
            try:
                manager.fire('a', {'event': event}, event_id=event)
                outcome = ACKNOWLEDGED
            except StorageUnavailable as exc:
                # What is said not to have happened is not tried again: it must not be there.
                outcome = UNKNOWN if exc.outcome_unknown or outcome else REFUSED
            self.journal.write(f'{event} {outcome}\n')
            if outcome == REFUSED:
                self.stop.wait(0.05)
                return


def main(url: str, prefix: str, journal: str, options: str) -> None:
    medium, stop = medium_of(url, prefix, json.loads(options)), threading.Event()
    with open(journal, 'a', buffering=1) as file:
        firing = [Firing(medium, file, stop, number) for number in range(THREADS)]
        threads = [threading.Thread(target=one.run, daemon=True) for one in firing]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), 'never acknowledged'


# --------------------------------------------------------------------- in the test


def patiently(action: Callable[[], T]) -> T:
    """Do something again until the storage answers; a fail-over may not be over yet."""
    found: list[T] = []

    def answered() -> bool:
        try:
            found.append(action())
        except StorageUnavailable:
            return False
        return True

    eventually(answered, 'an answer', timeout=60)
    return found[0]


@dataclass
class Report:
    """What the processes were told, and what is there.

    Attributes:
        outcomes: The last outcome of each firing, by event id.
        there: How often each was applied.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    there: Counter[str] = field(default_factory=Counter)

    def of(self, outcome: str) -> set[str]:
        return {event for event, last in self.outcomes.items() if last == outcome}

    @property
    def lost(self) -> set[str]:
        """What was acknowledged and is not there."""
        return self.of(ACKNOWLEDGED) - self.there.keys()

    def check(self) -> None:
        """Check what holds whatever happens."""
        assert set(self.there.values()) <= {1}, 'applied twice'
        assert not self.of(REFUSED) & self.there.keys(), 'said not to have happened'
        assert not self.of(UNKNOWN), 'never acknowledged'
        assert self.there.keys() <= self.outcomes.keys()

    def __str__(self) -> str:
        counts = Counter(self.outcomes.values())
        return f'{dict(counts)}, lost {len(self.lost)}'


class Storm:
    """Two processes that fire; use it in a ``with`` statement.

    Args:
        options: Their ``triggers_storage_options``.
    """

    def __init__(self, url: str, folder: Path, **options: Any):
        self.url, self.folder = url, folder
        self.options = {'socket_timeout': 2, **options}
        self.prefix, self.sessions = 'test-storm', SESSIONS
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Storm:
        for number in range(2):
            self._processes.append(
                subprocess.Popen(
                    [
                        sys.executable, '-m', 'tests.redis.storm', self.url, self.prefix,
                        str(self.folder / f'{number}.journal'), json.dumps(self.options),
                    ],
                    stdin=subprocess.PIPE, start_new_session=True, cwd=ROOT,
                )
            )
        self.wait_for(30)
        return self

    def wait_for(self, more: int) -> None:
        """Wait until each process has had so many more firings acknowledged."""
        for number in range(2):
            before = self._acknowledged(number)
            eventually(
                lambda number=number, before=before: self._acknowledged(number) >= before + more,
                'firings', timeout=60,
            )

    def _acknowledged(self, number: int) -> int:
        path = self.folder / f'{number}.journal'
        return path.read_text().count(ACKNOWLEDGED) if path.exists() else 0

    def unknown(self) -> int:
        """Return how often they were told that a firing may have happened."""
        return sum(path.read_text().count(UNKNOWN) for path in self.folder.glob('*.journal'))

    def connected(self, server: Server) -> bool:
        """Tell whether both use a server."""
        users = server.client.client_list(_type='normal')
        scripts = [user for user in users if user['cmd'].startswith('eval')]
        return len({user['addr'] for user in scripts}) > 2

    def end(self) -> Report:
        """Let the processes end; return what they were told and what is there now."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(90) == 0
        report = Report()
        for number in range(2):
            for line in (self.folder / f'{number}.journal').read_text().splitlines():
                event, _, outcome = line.rpartition(' ')
                report.outcomes[event] = outcome
        medium = medium_of(self.url, self.prefix, {})
        for uid in SESSIONS:
            storage = medium.manager(EACH, uid).storage
            for instance in patiently(lambda storage=storage: storage.instances).values():
                report.there[instance.kwargs['a']['event']] += 1
        report.check()
        print(report)
        return report

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == '__main__':
    main(*sys.argv[1:])
