"""Named points at which a process kills itself, or its parent, when it is told to.

The product has no hooks for this: :func:`install` wraps functions of the product, of Celery
and of kombu. Orders are files. A process that passes a point claims a matching order by
renaming its file, which one process alone can do, notes the kill in the journal ``kills``,
and kills. So each order is carried out once, however often and wherever the point is passed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.journal import Journal

#: Points of every process that changes sessions: one that fires, a pool's child that stores an
#: outcome, a sweeper.
COMMIT = ('before commit', 'after commit')
#: Between the statements of an SQL transaction and its end.
WITHIN = ('within commit',)
SEND = ('before send', 'after send', 'before confirm', 'after confirm')
#: Points of a delivery, in the order in which a child passes them.
DELIVERY = (
    'before claim', 'after claim', 'before code', 'in code', 'after code',
    'after result stored', 'before outcome', 'after outcome',
)
TAKE = ('before take', 'after take')
#: Points of a worker's parent alone.
ACK = ('before ack', 'after ack')

ROLES = ('firing', 'child', 'parent', 'sweeper')

#: In place of a uid: whatever the session.
ANY = 'any'


class _State:
    """What a process is told once it has been started."""

    journal: Journal | None = None
    orders: Path | None = None
    role = ''


def begin(folder: str | Path, role: str) -> None:
    """Tell this process where its orders are and what it is."""
    _State.journal = Journal(folder)
    _State.orders = Path(folder) / 'orders'
    _State.role = role


def become(role: str) -> None:
    """Tell a process, forked from one of another role, what it is."""
    _State.role = role


def role() -> str:
    return _State.role


# --------------------------------------------------------------------- orders


def order(folder: str | Path, point: str, role: str, key: str, action: str = 'kill') -> None:
    """Order one kill (or ``'stop'``) at a point.

    Args:
        role: Who: ``'parent'`` at a point of a child's means that the child kills its parent.
        key: A session's uid; its beginning up to ``:`` and ``*``; or :data:`ANY`.
    """
    place = Path(folder) / 'orders' / _name(point, role, key)
    place.mkdir(parents=True, exist_ok=True)
    number = uuid.uuid4().hex
    unfinished = Path(folder) / 'orders' / f'.{number}'
    unfinished.write_text(json.dumps({'point': point, 'role': role, 'key': key, 'do': action}))
    unfinished.rename(place / number)


def open_orders(folder: str | Path) -> list[str]:
    """Return what nobody has carried out yet."""
    return sorted(path.parent.name for path in _open(folder))


def withdraw_all(folder: str | Path) -> None:
    """Take every open order back."""
    for path in _open(folder):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _open(folder: str | Path) -> list[Path]:
    return [
        path for path in (Path(folder) / 'orders').glob('*/*') if path.parent.name != 'done'
    ]


def _name(point: str, role: str, key: str) -> str:
    return f'{point.replace(" ", "-")}~{role}~{key}'


def at(point: str, *uids: str) -> None:
    """Pass a point: carry an order for it out, if there is one."""
    if _State.orders is None or not _State.role:
        return
    roles = ('child', 'parent') if _State.role == 'child' else (_State.role,)
    prefixes = {f'{uid.partition(":")[0]}*' for uid in uids}
    for key in (*uids, *sorted(prefixes), ANY):
        for role in roles:
            claimed = _claim(_name(point, role, key))
            if claimed is not None:
                _carry_out(claimed, uids)


def _claim(name: str) -> dict[str, Any] | None:
    assert _State.orders is not None
    try:
        numbers = os.listdir(_State.orders / name)
    except FileNotFoundError:
        return None
    for number in numbers:
        done = _State.orders / 'done' / number
        try:
            os.rename(_State.orders / name / number, done)
        except FileNotFoundError:
            # Another process was faster.
            continue
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    return None


def _carry_out(claimed: dict[str, Any], uids: Iterable[str]) -> None:
    assert _State.journal is not None
    of_parent = claimed['role'] == 'parent' and _State.role == 'child'
    target = os.getppid() if of_parent else os.getpid()
    _State.journal.write(
        'kills', target=target, uids=list(uids), role=claimed['role'], point=claimed['point'],
        key=claimed['key'], do=claimed['do'],
    )
    number = signal.SIGSTOP if claimed['do'] == 'stop' else signal.SIGKILL
    os.kill(target, number)
    if of_parent:
        # A child of a killed parent gets a SIGKILL too; it does nothing until that arrives.
        os.kill(os.getpid(), number)
    while claimed['do'] == 'kill':
        time.sleep(0.01)


# -------------------------------------------------------------------- wrapping


def install() -> None:
    """Wrap the functions at whose begin and end the points are."""
    _wrap_storages()
    _wrap_messages()
    _wrap_results()
    _wrap_deliveries()
    _wrap_acknowledgements()


def _replace(owner: Any, name: str, wrapper: Any) -> None:
    """Replace a function in a class's own namespace, be it a classmethod or not."""
    # A KeyError for a function that has moved: a point that nobody passes would be missed late.
    found = vars(owner)[name]
    if isinstance(found, classmethod):
        setattr(owner, name, classmethod(functools.wraps(found.__func__)(wrapper(found.__func__))))
    else:
        setattr(owner, name, functools.wraps(found)(wrapper(found)))


class _Inside(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        self.committing: list[str] = []
        self.writing = 0


_inside = _Inside()


def _wrap_storages() -> None:
    import sqlalchemy as sa

    from celery_triggers.storages.base import StorageBackend
    from celery_triggers.storages.redis import RedisStorageBackend
    from celery_triggers.storages.relational import RelationalStorageBackend

    for backend in (RedisStorageBackend, RelationalStorageBackend):
        _replace(backend, '_commit', _around_commit)
        _replace(backend, '_write', _around_write)
        _replace(backend, 'take_due', _around_take)
    _replace(RedisStorageBackend, '_answers', _around_answers)
    for owner in (RedisStorageBackend, StorageBackend):
        _replace(owner, 'write_many', _around_writes)

    @sa.event.listens_for(sa.Engine, 'commit')
    def _within(connection: Any) -> None:
        if _inside.committing:
            at('within commit', _inside.committing[-1])


def _around_commit(original: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        at('before commit', self.uid)
        _inside.committing.append(self.uid)
        try:
            answer = original(self, *args, **kwargs)
        finally:
            _inside.committing.pop()
        if answer is None:
            # Anything else is a conflict: nothing was committed.
            at('after commit', self.uid)
        return answer

    return wrapper


def _around_answers(original: Any) -> Any:
    """Several commits in one round trip; a single one comes through ``_commit``."""

    def wrapper(cls: Any, questions: Any) -> Any:
        uids = [q.storage.uid for q in questions if q.commit is not None]
        together = len(questions) > 1 and bool(uids)
        if together:
            at('before commit', *uids)
        answers = original(cls, questions)
        if together:
            at('after commit', *uids)
        return answers

    return wrapper


def _kind(write: Any) -> str:
    """Say what a conditional write is for, by what it changes."""
    if 'sends' in write.changes:
        return 'confirm'
    return 'claim' if 'claimed' in write.changes else ''


@contextlib.contextmanager
def _around(kinds: dict[str, list[str]]) -> Iterator[None]:
    for kind, uids in kinds.items():
        at(f'before {kind}', *uids)
    yield
    for kind, uids in kinds.items():
        at(f'after {kind}', *uids)


def _around_write(original: Any) -> Any:
    def wrapper(self: Any, write: Any, *args: Any, **kwargs: Any) -> Any:
        kind = _kind(write)
        if not kind or _inside.writing:
            return original(self, write, *args, **kwargs)
        with _around({kind: [self.uid]}):
            return original(self, write, *args, **kwargs)

    return wrapper


def _around_writes(original: Any) -> Any:
    def wrapper(cls: Any, writes: Any, *args: Any, **kwargs: Any) -> Any:
        writes = list(writes)
        kinds: dict[str, list[str]] = {}
        if not _inside.writing:
            for storage, write in writes:
                if _kind(write):
                    kinds.setdefault(_kind(write), []).append(storage.uid)
        # One calls the other where a medium has no way of its own to write many.
        _inside.writing += 1
        try:
            with _around(kinds):
                return original(cls, writes, *args, **kwargs)
        finally:
            _inside.writing -= 1

    return wrapper


def _around_take(original: Any) -> Any:
    def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Any:
        at('before take')
        taken = original(cls, *args, **kwargs)
        if taken.entries:
            at('after take', *{entry.uid for entry in taken.entries})
        return taken

    return wrapper


def _wrap_messages() -> None:
    from kombu import Producer

    def around(original: Any) -> Any:
        def publish(self: Any, *args: Any, **kwargs: Any) -> Any:
            header = (kwargs.get('headers') or {}).get('triggers')
            if not isinstance(header, dict):
                return original(self, *args, **kwargs)
            with _around({'send': [str(header.get('uid'))]}):
                return original(self, *args, **kwargs)

        return publish

    _replace(Producer, 'publish', around)


def _wrap_results() -> None:
    from celery.backends.base import Backend

    def around(original: Any) -> Any:
        def store_result(self: Any, task_id: str, result: Any, state: str, *args: Any,
                         **kwargs: Any) -> Any:
            answer = original(self, task_id, result, state, *args, **kwargs)
            request = kwargs.get('request')
            header = (getattr(request, 'headers', None) or {}).get('triggers')
            if header and state in ('SUCCESS', 'FAILURE'):
                at('after result stored', header['uid'])
            return answer

        return store_result

    _replace(Backend, 'store_result', around)


def _wrap_deliveries() -> None:
    from celery_triggers.manager.delivery import Delivery

    def around(original: Any) -> Any:
        def report(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _around({'outcome': [str(self.header['uid'])]}):
                return original(self, *args, **kwargs)

        return report

    for name in ('finish', 'fail', 'lose', 'retry', 'replay', 'skip'):
        _replace(Delivery, name, around)


def _wrap_acknowledgements() -> None:
    from celery.worker.request import Request

    def around(original: Any) -> Any:
        def acknowledge(self: Any, *args: Any, **kwargs: Any) -> Any:
            header = self.request_dict.get('triggers')
            if self.acknowledged or not isinstance(header, dict):
                return original(self, *args, **kwargs)
            with _around({'ack': [str(header.get('uid'))]}):
                return original(self, *args, **kwargs)

        return acknowledge

    _replace(Request, 'acknowledge', around)
