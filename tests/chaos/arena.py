"""One place to kill in: private servers, workers and sweepers that are started again."""

from __future__ import annotations

import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from celery_triggers.exceptions import StorageUnavailable
from celery_triggers.registry import storage_backends
from celery_triggers.wiring import services_of
from tests.chaos import chaos_app, expect, points
from tests.chaos.journal import Journal
from tests.chaos.nursery import Nursery
from tests.chaos.places import RedisServer, wait_for

#: Statuses in which an instance is still on its way.
MOVING = ('scheduled', 'running')


class Kept:
    """Processes of one kind, of which a number is kept alive."""

    def __init__(self, number: int, start: Callable[[], int]):
        self.start = start
        self.pids: list[int] = [start() for _ in range(number)]
        self.started = number


class Arena:
    """Servers, an application, and the processes that work for it.

    Args:
        nursery: Forks the processes.
        folder: For files of every kind.
        storage: ``'redis'`` or ``'sql'``, or a URL.
        broker: A URL; without one, a private Redis.
        results_apart: Whether results have a server of their own.
        settings: See :func:`tests.chaos.chaos_app.create`.
    """

    def __init__(
        self, nursery: Nursery, folder: Path, *, storage: str = 'redis', broker: str = '',
        results_apart: bool = False, **settings: Any,
    ):
        self.nursery, self.folder = nursery, folder
        self.journal = Journal(folder)
        (folder / 'orders' / 'done').mkdir(parents=True, exist_ok=True)
        self.servers: list[Any] = []
        self.name = f'chaos-{uuid.uuid4().hex[:8]}'
        #: Holds sessions unless they are in SQLite, and mostly results.
        self.store = self.server(RedisServer)
        self.broker = self.server(RedisServer) if not broker else None
        urls = {'redis': self.store.url, 'sql': f'sqlite:///{folder}/sessions.db'}
        self.settings: dict[str, Any] = {
            'broker': self.broker.url if self.broker else broker,
            'backend': (self.server(RedisServer) if results_apart else self.store).database(1),
            'storage': urls.get(storage, storage),
            'name': self.name,
            'folder': str(folder),
            **settings,
        }
        self.app = chaos_app.create(**self.settings)
        self._kept: list[Kept] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self.others: list[int] = []

    # ---------------------------------------------------------------- processes

    def server(self, kind: Any) -> Any:
        """Start a private server; it ends with the arena."""
        folder = self.folder / f'{kind.__name__.lower()}-{len(self.servers)}'
        server = kind(self.nursery, folder)
        self.servers.append(server)
        return server.start()

    def log(self, name: str) -> Path:
        return self.folder / f'{name}.log'

    def worker(self, *arguments: str, log: str = 'workers', **settings: Any) -> int:
        """Start one worker, which nobody starts again."""
        pid = self.nursery.worker(
            {**self.settings, **settings}, *arguments, log=self.log(log)
        )
        self.others.append(pid)
        return pid

    def sweeper(self, pause: float = 0.2, **settings: Any) -> int:
        """Start one process that sweeps, which nobody starts again."""
        pid = self.nursery.sweeper({**self.settings, **settings}, pause, self.log('sweepers'))
        self.others.append(pid)
        return pid

    def keep_workers(self, number: int, *arguments: str, **settings: Any) -> Kept:
        """Start workers, and start another one for each that ends."""
        return self._keep(number, lambda: self.nursery.worker(
            {**self.settings, **settings}, *arguments, log=self.log('workers')
        ))

    def keep_sweepers(self, number: int, pause: float = 0.2) -> Kept:
        return self._keep(number, lambda: self.nursery.sweeper(
            self.settings, pause, self.log('sweepers')
        ))

    def _keep(self, number: int, start: Callable[[], int]) -> Kept:
        kept = Kept(number, start)
        with self._lock:
            self._kept.append(kept)
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._watch, daemon=True)
            self._keeper.start()
        return kept

    def _watch(self) -> None:
        while not self._closing.wait(0.05):
            with self._lock:
                for kept in self._kept:
                    for index, pid in enumerate(kept.pids):
                        if not self.nursery.alive(pid):
                            kept.pids[index] = kept.start()
                            kept.started += 1

    def release(self, kept: Kept) -> None:
        """Kill kept processes and keep them no more."""
        with self._lock:
            self._kept.remove(kept)
        for pid in kept.pids:
            self.kill(pid)

    def calm(self) -> None:
        """Kill every kept process and take open orders back."""
        for kept in list(self._kept):
            self.release(kept)
        points.withdraw_all(self.folder)

    def kill(self, pid: int, role: str = '', number: int = signal.SIGKILL) -> bool:
        """Kill a forked process; with a role, the kill is noted as part of the test."""
        if role:
            self.journal.write(
                'kills', target=pid, uids=[], role=role, point='any', key='', do='kill'
            )
        return self.nursery.kill(pid, number)

    def close(self) -> None:
        """End every process of this arena, and its servers."""
        self._closing.set()
        if self._keeper is not None:
            self._keeper.join(10)
        for pid in [*self.others, *(pid for kept in self._kept for pid in kept.pids)]:
            self.nursery.kill(pid, signal.SIGKILL)
        self._forget_queues()
        self.app.close()
        for server in self.servers:
            server.end()
            shutil.rmtree(server.folder, ignore_errors=True)

    def _forget_queues(self) -> None:
        """Leave nothing in a RabbitMQ that is not this arena's."""
        own = [server.url for server in self.servers]
        if self.settings['broker'] in own or not self.settings['broker'].startswith('amqp'):
            return
        with self.app.connection_for_write() as connection:
            for name in (self.name, f'{self.name}-left', f'{self.name}-right'):
                connection.default_channel.queue_delete(name)
                connection.default_channel.exchange_delete(name)

    # ------------------------------------------------------------------- firing

    def uid(self, scenario: str) -> str:
        """Return a new uid of a scenario such as ``'chain-late'``."""
        return f'{scenario}:{uuid.uuid4().hex[:12]}'

    def job(
        self, uid: str, trigger: str, kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Return a firing for a forked process to make."""
        number = uuid.uuid4().hex[:12]
        return {'id': number, 'uid': uid, 'trigger': trigger, 'kwargs': dict(kwargs or {}),
                'event_id': f'e-{number}', **more}

    def fire(self, *jobs: dict[str, Any], **settings: Any) -> int:
        """Fork a process that makes firings; return its pid."""
        return self.nursery.fire({**self.settings, **settings}, list(jobs), self.log('firing'))

    def acknowledged(self) -> dict[str, dict[str, Any]]:
        """Return ``{job id: answer}`` for the firings that were answered well."""
        return {ack['id']: ack for ack in self.journal.read('acks') if ack['ok']}

    def fire_until_acknowledged(self, *jobs: dict[str, Any]) -> None:
        """Fire, and again with the same event ids, until each has been acknowledged."""

        def done() -> bool:
            known = self.acknowledged()
            left = [job for job in jobs if job['id'] not in known]
            if left:
                self.nursery.wait(self.fire(*left), 600)
            return not left

        wait_for(done, 'every firing is acknowledged')

    # ------------------------------------------------------------------- asking

    def storage(self, uid: str) -> Any:
        return self.app.triggers.session(uid).storage

    def instances(self, uid: str) -> dict[str, Any]:
        return dict(self.storage(uid).instances)

    def fired(self, uid: str) -> list[str]:
        return [record.trigger for record in self.storage(uid).history]

    def statuses(self, uid: str) -> dict[str, str]:
        return {name: str(i.status) for name, i in self.instances(uid).items()}

    def settled(
        self, plans: Mapping[str, Mapping[str, Any]] | Iterable[str],
        timeout: float | None = None,
    ) -> None:
        """Wait until sessions have ended as the rules demand.

        Args:
            plans: ``{uid: plan}``, see :func:`tests.chaos.expect.problem`; uids alone where
                the plan is empty.
        """
        left = dict(plans) if isinstance(plans, Mapping) else {uid: {} for uid in plans}
        problems: dict[str, str] = {}

        def nothing_left() -> bool:
            for uid, plan in list(left.items()):
                problems[uid] = self.problem(uid, plan)
                if not problems[uid]:
                    del left[uid]
            return not left

        try:
            wait_for(nothing_left, 'sessions end', timeout)
        except AssertionError as exc:
            what = '\n'.join(f'{uid}: {problems[uid]}' for uid in left)
            raise AssertionError(f'{exc}\n{what}\n{self.describe(list(left)[:5])}') from None

    def problem(self, uid: str, plan: Mapping[str, Any]) -> str:
        """Say why a session has not ended as the rules demand; ``''`` if it has."""
        try:
            found = self.instances(uid)
        except StorageUnavailable as exc:
            return str(exc)
        moving = [name for name, i in found.items() if i.status in MOVING]
        return f'{moving} on the way' if moving else expect.problem(uid, plan, found)

    def dues(self) -> list[tuple[str, str, int]]:
        """Return every due date of the storage."""
        key, url = services_of(self.app).settings.storage_location()
        class_: Any = storage_backends.get_class(key)
        return [tuple(due) for due in class_.due_dates(url, services_of(self.app).settings)]

    def open_orders(self) -> list[str]:
        return points.open_orders(self.folder)

    def describe(self, uids: Iterable[str]) -> str:
        """Return what people need to know of sessions that did not do as they should."""
        lines = []
        executions = self.journal.read('executions')
        kills = self.journal.read('kills')
        received = self.journal.read('received')
        for uid in uids:
            lines += [self.storage(uid).debug_repr(), 'log:']
            pids = {
                pid for line in (*executions, *received) if line['uid'] == uid
                for pid in (line['pid'], line['ppid'])
            }
            events = [
                *(f'{e["at"] / 1e9:.3f} {e["what"]} {e["instance"]} attempt {e["attempt"]} '
                  f'in {e["pid"]}' for e in executions if e['uid'] == uid),
                *(f'{k["at"] / 1e9:.3f} kill {k["point"]} {k["role"]} {k["target"]}'
                  for k in kills if uid in k['uids'] or k['target'] in pids),
                *(f'{r["at"] / 1e9:.3f} received {r["instance"]} by {r["pid"]}'
                  for r in received if r['uid'] == uid),
            ]
            lines += [f'  {event}' for event in sorted(events)]
            for name, found in self.instances(uid).items():
                lines.append(f'  {name}: {found.record}')
        lines.append(f'open orders: {self.open_orders()}')
        return '\n'.join(lines)
