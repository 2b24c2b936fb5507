"""A warm process from which workers, firing processes, sweepers and servers are forked.

Importing Celery takes a second; a fork of a process that has imported it takes milliseconds.
The warm process has one thread, no connection and no application: each fork makes its own.

It reads commands, one JSON object a line, from its standard input, and writes answers and
the ends of its children to its standard output. When its input ends, it kills what it has
started. Children ask the kernel to be killed with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]


# -------------------------------------------------------------- the test's side


class Nursery:
    """The test's hand on the warm process."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        self._answers: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.chaos.nursery'], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, 'C_FORCE_ROOT': '1'},
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._ask('hello')

    def worker(self, settings: dict[str, Any], *arguments: str, log: Path) -> int:
        """Fork a worker; return its pid."""
        return int(self._ask('worker', settings=settings, args=arguments, log=str(log)))

    def fire(self, settings: dict[str, Any], jobs: list[dict[str, Any]], log: Path) -> int:
        """Fork a process that fires; see :func:`_fire` for what a job is."""
        return int(self._ask('fire', settings=settings, jobs=jobs, log=str(log)))

    def sweeper(self, settings: dict[str, Any], pause: float, log: Path) -> int:
        """Fork a process that sweeps again and again."""
        return int(self._ask('sweep', settings=settings, pause=pause, log=str(log)))

    def run(
        self, command: list[str], environment: dict[str, str], folder: Path, log: Path
    ) -> int:
        """Run a program, a server say, in a process group of its own; return its pid."""
        return int(self._ask(
            'run', command=command, environment=environment, folder=str(folder), log=str(log)
        ))

    def kill(self, pid: int, number: int = signal.SIGKILL, *, group: bool = False) -> bool:
        """Send a signal to a process that was forked here, if it still lives.

        Args:
            group: Whether its whole process group is meant.
        """
        return bool(self._ask('signal', pid=pid, signal=int(number), group=group))

    def alive(self, pid: int) -> bool:
        return pid not in self.ended

    def wait(self, pid: int, timeout: float = 60) -> int:
        """Wait until a process has ended; return its exit code, negative for a signal."""
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self.ended, timeout):
                raise AssertionError(f'process {pid} does not end')
            return self.ended[pid]

    def children_of(self, pid: int) -> list[int]:
        """Return the pids of a forked process's own children."""
        try:
            return [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
        except OSError:
            return []

    def kill_child(self, pid: int, child: int, number: int = signal.SIGKILL) -> bool:
        """Send a signal to a child of a forked process, and to nobody who has its pid later."""
        try:
            handle = os.pidfd_open(child)
        except ProcessLookupError:
            return False
        try:
            if child not in self.children_of(pid):
                return False
            signal.pidfd_send_signal(handle, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)

    def close(self) -> None:
        """End the warm process and everything that it has started."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def _ask(self, what: str, **facts: Any) -> Any:
        with self._changed:
            self._number += 1
            number = self._number
            line = json.dumps({'do': what, 'number': number, **facts}) + '\n'
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            if not self._changed.wait_for(lambda: number in self._answers, 60):
                raise AssertionError(f'the nursery does not answer: {what}')
            return self._answers.pop(number)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            with self._changed:
                if 'ended' in message:
                    self.ended[message['ended']] = message['code']
                else:
                    self._answers[message['number']] = message['answer']
                self._changed.notify_all()


# ------------------------------------------------------------ the warm process


def _warm_up() -> None:
    """Import what the children will need."""
    import importlib

    for module in (
        'celery.bin.celery', 'celery.bin.worker', 'celery.apps.worker',
        'celery.concurrency.prefork', 'celery.concurrency.asynpool', 'celery.concurrency.thread',
        'celery.concurrency.solo',
        'celery.backends.redis', 'celery.worker.consumer', 'celery.worker.components',
        'celery.worker.autoscale', 'celery.worker.loops', 'celery.fixups.django',
        'kombu.transport.redis', 'kombu.transport.pyamqp', 'sqlalchemy.dialects.sqlite',
        'celery_triggers', 'celery_triggers.app', 'celery_triggers.storages.redis.backend',
        'celery_triggers.storages.sql.backend', 'tests.chaos.chaos_app', 'tests.chaos.points',
    ):
        importlib.import_module(module)
    from tests.chaos import points

    points.install()


class _Warm:
    """Forks on command and tells of the ends."""

    def __init__(self) -> None:
        self.children: set[int] = set()
        self._input = b''
        # Whatever a library prints must not be taken for an answer.
        self._output = os.dup(1)
        os.dup2(2, 1)

    def run(self) -> None:
        receiver, sender = os.pipe()
        for end in (receiver, sender):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(sender)
        selector = selectors.DefaultSelector()
        selector.register(0, selectors.EVENT_READ)
        selector.register(receiver, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(1):
                if key.fd == receiver:
                    with contextlib.suppress(BlockingIOError):
                        os.read(receiver, 1000)
                    continue
                data = os.read(0, 1 << 20)
                if not data:
                    return self._end()
                self._input += data
                *lines, self._input = self._input.split(b'\n')
                for line in lines:
                    self._obey(json.loads(line))
            self._reap()

    def _obey(self, command: dict[str, Any]) -> None:
        what = command['do']
        if what == 'signal':
            # Not reaped here, so the pid is still that child's.
            self._reap()
            answer: Any = command['pid'] in self.children
            if answer:
                send = os.killpg if command['group'] else os.kill
                send(command['pid'], command['signal'])
        elif what == 'hello':
            answer = True
        else:
            answer = self._fork(command)
        self._tell(number=command['number'], answer=answer)

    def _fork(self, command: dict[str, Any]) -> int:
        pid = os.fork()
        if pid:
            self.children.add(pid)
            return pid
        code = 1
        try:
            _become_a_child(command['log'])
            os.close(self._output)
            code = {'worker': _work, 'fire': _fire, 'sweep': _sweep, 'run': _run}[
                command['do']
            ](command)
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        for pid in list(self.children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.children.discard(pid)
                self._tell(ended=pid, code=os.waitstatus_to_exitcode(status))

    def _tell(self, **facts: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._output, (json.dumps(facts) + '\n').encode())

    def _end(self) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            self._reap()
            for pid in self.children:
                # Each leads a group of its own, which is just what was started here.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
            until = time.monotonic() + (5 if number == signal.SIGTERM else 0.01)
            while self.children and time.monotonic() < until:
                time.sleep(0.02)
                self._reap()


def _become_a_child(log: str) -> None:
    from celery.platforms import set_pdeathsig

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    set_pdeathsig('SIGKILL')
    with open(log, 'ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with open(os.devnull, 'rb') as nothing:
        os.dup2(nothing.fileno(), 0)
    # Set up anew by whoever needs it, with a handler that writes to this log.
    import logging

    logging.basicConfig(
        level=logging.INFO, format='%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(message)s',
        datefmt='%H:%M:%S',
    )


def _run(command: dict[str, Any]) -> int:
    os.chdir(command['folder'])
    arguments = command['command']
    os.execvpe(arguments[0], arguments, {**os.environ, **command['environment']})


def _create(command: dict[str, Any], role: str) -> Any:
    from tests.chaos import chaos_app, points

    settings = command['settings']
    points.begin(settings['folder'], role)
    app = chaos_app.create(**settings)
    app.set_current()
    return app


def _work(command: dict[str, Any]) -> int:
    from tests.chaos import chaos_app

    app = _create(command, 'parent')
    chaos_app.watch(command['settings']['folder'])
    name = command['settings']['name']
    arguments = list(command['args'])
    if '--queues' not in arguments:
        arguments += ['--queues', name]
    app.worker_main([
        'worker', '--hostname', f'{name}-{os.getpid()}@chaos', '--loglevel', 'INFO',
        '--without-gossip', '--without-mingle', '--without-heartbeat', *arguments,
    ])
    return 0


def _fire(command: dict[str, Any]) -> int:
    """Make firings one after the other and note in the journal ``acks`` what came of each.

    A job is ``{'id', 'uid', 'trigger', 'kwargs', 'event_id'}``, perhaps with ``'pause'``,
    seconds to wait before it, or ``'replay'``, an instance that is to be replayed instead.
    A list of such jobs under ``'many'`` is fired by one ``fire_many``. What follows in a session
    after a firing that failed is left for later, so that its firings stay in order.
    """
    from celery_triggers.exceptions import InvalidTransition, StorageUnavailable
    from tests.chaos.journal import Journal

    app = _create(command, 'firing')
    journal = Journal(command['settings']['folder'])
    waiting: set[str] = set()
    for job in command['jobs']:
        if job.get('uid', '') in waiting:
            continue
        time.sleep(job.get('pause', 0))
        begun = time.monotonic()
        facts: dict[str, Any] = {'id': job['id'], 'uid': job.get('uid', '')}
        try:
            facts['duplicate'] = _make(app, job)
            facts['ok'] = True
        except StorageUnavailable as exc:
            # As an application does: it comes again with the same event id.
            facts.update(ok=False, unknown=exc.outcome_unknown)
            if facts['uid']:
                waiting.add(facts['uid'])
        except InvalidTransition as exc:
            # A replay that was made before its answer was lost.
            facts.update(ok=True, refused=str(exc))
        except Exception as exc:
            facts.update(ok=False, error=f'{type(exc).__name__}: {exc}')
        journal.write('acks', seconds=time.monotonic() - begun, **facts)
    return 0


def _make(app: Any, job: dict[str, Any]) -> Any:
    if 'many' in job:
        firings = [
            {'uid': one['uid'], 'trigger_name': one['trigger'], 'trigger_kwargs': one['kwargs'],
             'event_id': one['event_id']}
            for one in job['many']
        ]
        return [firing.duplicate for firing in app.triggers.fire_many(firings)]
    if 'replay' in job:
        app.triggers.session(job['uid']).replay_failed_instance(job['replay'])
        return False
    return app.triggers.fire(
        job['uid'], job['trigger'], job['kwargs'], event_id=job['event_id']
    ).duplicate


def _sweep(command: dict[str, Any]) -> int:
    from celery_triggers.exceptions import StorageUnavailable

    app = _create(command, 'sweeper')
    while True:
        try:
            report = app.triggers.sweep()
            if any(vars_of(report).values()):
                print(f'{time.strftime("%H:%M:%S")} {os.getpid()} {report}', flush=True)
        except StorageUnavailable as exc:
            print(f'{time.strftime("%H:%M:%S")} {os.getpid()} {exc}', flush=True)
        time.sleep(command['pause'])


def vars_of(report: Any) -> dict[str, Any]:
    """Return the attributes of a report, whatever kind of class it is."""
    if hasattr(report, '_asdict'):
        return dict(report._asdict())
    names = getattr(type(report), '__slots__', ()) or vars(report)
    return {name: getattr(report, name) for name in names}


if __name__ == '__main__':
    _warm_up()
    _Warm().run()
