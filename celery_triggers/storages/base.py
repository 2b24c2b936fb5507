"""The contract of a storage backend: read a slice, commit it, write one row.

Siblings (memory, redis, sql, ...) implement the underscored methods and never meet.
"""

from __future__ import annotations

import os
import re
import secrets
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from celery_triggers.engine.configuration import Configuration
from celery_triggers.engine.draft import Draft
from celery_triggers.engine.names import check_uid
from celery_triggers.engine.session import Plan
from celery_triggers.exceptions import (
    InvalidFiring,
    StorageNotConfigured,
    StorageUnavailable,
    TriggersError,
)
from celery_triggers.forks import ForkLock
from celery_triggers.settings import Settings
from celery_triggers.storages.codec import codec_for
from celery_triggers.storages.records import (
    Commit,
    Request,
    Row,
    Slice,
    StoredFiring,
    Taken,
    Write,
)
from celery_triggers.storages.snapshot import Snapshot
from celery_triggers.storages.translation import to_commit, to_request, to_session
from celery_triggers.storages.view import SessionView
from celery_triggers.wiring import Application, current_application, services_behind

__all__ = ['Question', 'Shared', 'StorageBackend']

T = TypeVar('T')
R = TypeVar('R', bound='_Renewable')

_CONFIGURATIONS: OrderedDict[str, Configuration] = OrderedDict()
_MOST_CONFIGURATIONS = 1000


def remember_configuration(configuration: Configuration) -> Configuration:
    """Keep a configuration in this process; content never changes under a digest."""
    known = _CONFIGURATIONS.setdefault(configuration.digest, configuration)
    if len(_CONFIGURATIONS) > _MOST_CONFIGURATIONS:
        _CONFIGURATIONS.popitem(last=False)
    return known


def public_url(url: str) -> str:
    """Return a URL, or several with ``;`` between them, without what nobody may read."""
    # Up to the last @: a password in which nothing is quoted may hold anything.
    several = re.split(r';(?=[\w+]+://)', url)
    without_user = ';'.join(re.sub(r'(?<=://)[^/].*@', '', one, flags=re.DOTALL) for one in several)
    return re.sub(r'(?i)((?:pass|pwd|secret|token)\w*=)[^&;]*', r'\1***', without_user)


#: What an application may want of a session's storage.
_FOR_APPLICATIONS = frozenset({
    'clone_instance', 'create_instance', 'debug_repr', 'delete', 'exists',
    'get_instances_with_unresolved_logs', 'get_unresolved_instances', 'get_unresolved_tasks',
    'history', 'instances', 'instances_of_task', 'key', 'latest_kwargs', 'metadata', 'tasks', 'uid',
})


class _Renewable(Protocol):
    """Has connections, which a forked child must leave to its parent."""

    def renew(self) -> None:
        """Take new connections in a forked child."""


class Shared(Generic[R]):
    """What the storages at one place share in this process, a client say.

    In a forked child each takes new connections.

    Args:
        make: Makes one, given what names the place and the options of the medium.
    """

    def __init__(self, make: Callable[..., R]):
        self._make = make
        self._made: dict[tuple[Any, ...], R] = {}
        self._lock = ForkLock()
        os.register_at_fork(after_in_child=self._renew_all)

    def get(self, *place: str, options: Mapping[str, Any]) -> R:
        """Return the one of a place, made when it is first asked for."""
        key = (*place, *sorted((name, repr(value)) for name, value in options.items()))
        found = self._made.get(key)
        if found is None:
            with self._lock:
                found = self._made.get(key)
                if found is None:
                    found = self._made[key] = self._make(*place, options)
        return found

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._made.values()))

    def _renew_all(self) -> None:
        for made in self:
            made.renew()


@dataclass(slots=True)
class Question:
    """What a storage is asked in one round trip, and how its answer is understood.

    Attributes:
        commit: What is to be applied; ``None``: this question only reads.
        plan: What the answer must hold, with the configuration that it was made for.
    """

    storage: StorageBackend
    request: Request
    commit: Commit | None
    plan: Plan
    expected: Configuration | None
    passing: str

    def ask(self) -> Snapshot | None:
        """Ask it alone.

        Raises:
            StorageUnavailable: No answer came; a commit may have been applied.
        """
        return self.understand(self.answer())

    def answer(self) -> Slice | None:
        """Return the medium's answer as it came."""
        if self.commit is None:
            return self.storage._read(self.request)
        return self.storage._commit(self.commit, self.request)

    def understand(self, found: Slice | None) -> Snapshot | None:
        """Return what an answer means; ``None``: the commit was applied."""
        # The medium may have repeated a commit whose answer was lost: the version that is
        # there now is this one's, so it was applied.
        if found is None or (self.commit is not None and found.version == self.commit.version):
            return None
        return self.storage._snapshot(self.plan, found, self.expected, self.passing)


def _understood(
    question: Question, found: Slice | Exception | None
) -> Snapshot | Exception | None:
    try:
        return found if isinstance(found, Exception) else question.understand(found)
    except Exception as exc:  # noqa: BLE001
        # Kept for the one who asked; the answers to others are none the worse.
        return exc


class StorageBackend(SessionView):
    """One session's state in one storage.

    Args:
        uid: The session's uid, any non-empty string.
        url: Where the storage is; without one, the ``triggers_storage`` of the current
            Celery application.
        application: Whose settings and trigger tasks apply; without one, the current
            Celery application's.
        options: Further options of the medium, over ``triggers_storage_options``.

    Raises:
        InvalidFiring: The uid cannot name a session.
        StorageNotConfigured: There is neither a URL nor a setting.
    """

    #: The registry key; workers find the storage of a message by it.
    key: ClassVar[str]

    #: Where the storage is if a registry key is all that the settings say.
    default_url: ClassVar[str | None] = None

    #: What a message names beside the key, for workers to find a session that is not where
    #: their settings say; ``None``: it is there, or workers would not find it.
    elsewhere: str | None = None

    def __dir__(self) -> list[str]:
        """List what an application uses: the rest is for those who write storages."""
        return sorted({*_FOR_APPLICATIONS, *(n for n in super().__dir__() if n.startswith('_'))})

    def __init__(
        self,
        uid: str,
        url: str | None = None,
        *,
        application: Application | None = None,
        **options: Any,
    ):
        self.uid = check_uid(uid)
        self.application = services_behind(application) or current_application()
        self.settings = self.application.settings.frozen()
        self.url = url or self._url_of_settings() or self.default_url
        known: dict[str, Any] = self.settings.storage_options
        self.options = {**known, **options} if options else known
        self.codec = codec_for(self.settings.serializer, tuple(self.settings.accept_content))
        self._open()

    def _url_of_settings(self) -> str | None:
        """Return the URL of the settings, if they name this kind of storage.

        Raises:
            StorageNotConfigured: They name another kind, so that nobody would look here.
        """
        key, url = self.settings.storage_location_or_none() or (self.key, None)
        if key == self.key:
            return url
        if self.default_url is None:
            return None
        raise StorageNotConfigured(
            f'the storage {self.key!r} of session {self.uid!r} has no URL: triggers_storage '
            f'names {public_url(url or key)!r}'
        )

    def __repr__(self) -> str:
        return f'<{type(self).__name__} {self.uid!r}>'

    @property
    def place(self) -> str:
        """Where the storage is, for people: its URL without a password."""
        return public_url(self.url) if self.url else self.key

    # ------------------------------------------------------- for the manager

    def reading(
        self, plan: Plan, expected: Configuration | None = None, passing: str = ''
    ) -> Question:
        """Return the question that reads what ``plan`` asks for, in one round trip.

        Args:
            expected: The configuration that the plan was made for. If the session has
                another one, that one is loaded, and the plan may not be enough.
            passing: The made-up event id of the change that is being decided.
        """
        return Question(self, to_request(plan, passing), None, plan, expected, passing)

    def committing(self, snapshot: Snapshot, draft: Draft) -> Question:
        """Return the question that applies a step if nobody changed the session meanwhile.

        The answer is ``None`` if it was applied, else a fresh snapshot to decide on again.
        """
        session, passing = snapshot.session, snapshot.passing
        commit = to_commit(
            draft,
            snapshot.slice,
            secrets.token_hex(8),
            self.codec,
            int(self.settings.history_limit),
        )
        expires = self.settings.session_expires
        if expires is not None:
            commit.dues[''] = draft.now + int(expires * 1000)
        request = to_request(session.plan, passing)
        return Question(self, request, commit, session.plan, session.configuration, passing)

    @classmethod
    def ask_many(cls, questions: Sequence[Question]) -> list[Snapshot | Exception | None]:
        """Ask questions about different sessions, sharing round trips where that can be.

        Returns:
            For each its answer or what asking raised. When the storage is found to be
            unavailable the rest is not asked.
        """
        pairs = zip(questions, cls._answers(questions), strict=True)
        return [_understood(question, found) for question, found in pairs]

    def read(
        self, plan: Plan, expected: Configuration | None = None, passing: str = ''
    ) -> Snapshot:
        """Read at once: see :meth:`reading`.

        Raises:
            StorageUnavailable: No answer came.
        """
        snapshot = self.reading(plan, expected, passing).ask()
        assert snapshot is not None
        return snapshot

    def write(self, write: Write) -> tuple[bool, Row | None]:
        """Change one row if a guard matches; the session's version stays as it is.

        Returns:
            Whether it was changed, and the row as it is now (``None``: no such row).
        """
        return self._write(write)

    @classmethod
    def write_many(
        cls, writes: Sequence[tuple[StorageBackend, Write]]
    ) -> list[tuple[bool, Row | None] | StorageUnavailable]:
        """Make conditional writes, of any sessions, sharing round trips where that can be.

        Returns:
            For each what :meth:`write` returns or raised. When the storage is found to be
            unavailable the rest is not tried.
        """
        answers: list[tuple[bool, Row | None] | StorageUnavailable] = []
        down: StorageUnavailable | None = None
        for storage, write in writes:
            if down is None:
                try:
                    answers.append(storage._write(write))
                    continue
                except StorageUnavailable as exc:
                    down = exc
            answers.append(down)
        return answers

    def delete(self, version: str | None = None) -> bool:
        """Remove the session; tell whether there was one.

        Args:
            version: Remove it only if it still has this version.
        """
        return self._delete(version)

    # ------------------------------------------- firings within transactions

    def takes_part(self, connection: Any = None) -> bool:
        """Tell whether a firing now is part of a transaction of the application's.

        Args:
            connection: What the application gave with the firing.

        Raises:
            InvalidFiring: This storage cannot take part in that.
        """
        if connection is not None:
            raise InvalidFiring(
                f'a firing cannot be part of a transaction with the storage {self.key!r}; '
                "'sql' and 'django' can",
                uid=self.uid,
            )
        return False

    def store_firing(
        self, firing: StoredFiring, connection: Any, then: Callable[[], object]
    ) -> int:
        """Store a firing within the application's transaction, and touch nothing else.

        Args:
            then: Is called soon after the transaction was committed, in its thread, if this
                process lives on; what it raises is logged.

        Returns:
            The storage's time, in milliseconds.
        """
        raise NotImplementedError

    def stored_firing(self, id_: str) -> tuple[int, StoredFiring] | None:
        """Return when a firing was stored, and the firing; ``None``: it is not there."""
        return None

    def forget_firing(self, id_: str) -> None:
        """Remove a stored firing that was applied."""

    def after_commit(self, call: Callable[[], object]) -> None:
        """Call this when what was changed just now is committed: here it is already.

        Where changes can be part of a transaction of the application's, it is called after
        that one's commit, in its thread, or never if it is rolled back.
        """
        call()

    def configuration(self, digest: str) -> Configuration:
        """Return a stored configuration.

        Raises:
            TriggersError: The storage does not have it, so it lost something.
        """
        known = _CONFIGURATIONS.get(digest)
        if known is None:
            text = self._configuration(digest)
            if text is None:
                raise TriggersError(
                    f'session {self.uid!r} has a configuration ({digest}) that its storage '
                    'does not hold; the storage has lost data'
                )
            known = remember_configuration(Configuration.from_text(text))
        return known

    def _snapshot(
        self, plan: Plan, found: Slice, expected: Configuration | None, passing: str
    ) -> Snapshot:
        empty = expected if expected is not None else Configuration({})
        session = to_session(self.uid, found, empty, plan, self.codec)
        digest = session.head.digest
        if digest and digest != empty.digest:
            session.configuration = self.configuration(digest)
        return Snapshot(session, found, passing)

    # ------------------------------------------------------ for implementations

    def _open(self) -> None:
        """Prepare the medium; called once, from the constructor."""

    @abstractmethod
    def _read(self, request: Request) -> Slice:
        """Read at one moment what is asked for."""

    @abstractmethod
    def _commit(self, commit: Commit, request: Request) -> Slice | None:
        """Apply a commit whole, or answer with the slice as it is now."""

    @classmethod
    def _answers(cls, questions: Sequence[Question]) -> list[Slice | Exception | None]:
        """Answer questions about different sessions; here one after the other."""
        answers: list[Slice | Exception | None] = []
        down = None
        for question in questions:
            try:
                answers.append(question.answer() if down is None else StorageUnavailable(down))
            except StorageUnavailable as exc:
                down = str(exc)
                answers.append(exc)
        return answers

    @abstractmethod
    def _write(self, write: Write) -> tuple[bool, Row | None]:
        """Apply a conditional write to one row."""

    @abstractmethod
    def _delete(self, version: str | None = None) -> bool:
        """Remove everything of the session but its configuration, if it has this version."""

    @abstractmethod
    def _configuration(self, digest: str) -> str | None:
        """Return the text of a stored configuration."""

    @classmethod
    @abstractmethod
    def uids(cls, url: str | None, settings: Settings, prefix: str = '') -> Iterator[str]:
        """Yield the uids of the sessions that begin with ``prefix``, in no order."""

    @classmethod
    @abstractmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        """Take what is due at this place; nobody else gets the same.

        The due date of each is moved before it is returned, so that one that cannot be
        dealt with comes again later and holds up no other.

        Args:
            limit: About how many to take at most.
            push: By how many milliseconds from now on to move them.
            gap: For how many milliseconds nobody need have asked for what is due not to be
                called calm, for as long again.
        """

    @classmethod
    @abstractmethod
    def gates(
        cls, url: str | None, settings: Settings, task_ids: Sequence[str]
    ) -> dict[str, tuple[str, str]]:
        """Return which of these tasks wait at gates: ``{task id: (uid, instance name)}``.

        It may name some that wait no longer.
        """

    @classmethod
    @abstractmethod
    def due_dates(cls, url: str | None, settings: Settings) -> Iterator[tuple[str, str, int]]:
        """Yield every due date at this place, in no order: ``(uid, name, milliseconds)``."""
