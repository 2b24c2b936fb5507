"""Sessions in a cache of Django's: Redis, Memcached, a database.

How a cache is made to replace a document only if nobody else has is told in
:mod:`celery_triggers.storages.cache.versions`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.registry import storage_backends
from celery_triggers.settings import Settings
from celery_triggers.storages.cache.server import CacheServer, aliases
from celery_triggers.storages.cache.versions import FOR_GOOD, Versions
from celery_triggers.storages.document import DocumentStorageBackend
from celery_triggers.storages.records import Taken
from celery_triggers.wiring import Application

__all__ = ['CacheStorageBackend']

logger = logging.getLogger(__name__)

#: Of a session, in seconds.
DEFAULT_TIMEOUT = 3600

#: Ten years. Memcached takes a timeout for a date, and not for a later one than 2106.
MOST_TIMEOUT = 315_360_000

#: The other caches of which it was said that they are down.
_unavailable: set[str | None] = set()

#: The caches of whose timeout it was said that it is short.
_warned: set[str] = set()

#: Stands for a timeout that is not given, since ``None`` is one.
_NOT_GIVEN = cast('float | None', object())


@storage_backends.register('cache')
class CacheStorageBackend(DocumentStorageBackend):
    """Keeps a session in a cache of Django's.

    Args:
        cache: An alias in Django's ``CACHES``, or a URL ``cache://<alias>?timeout=<seconds>``;
            without one, that of ``triggers_storage``, or ``'default'``.
        timeout: After how many seconds without a change the session goes, ``None`` for
            never; without one, that of the URL or of ``triggers_storage_options``, or 3600.
            It is kept with the session: whoever changes it later keeps to it.

    Raises:
        StorageNotConfigured: There is no such cache, or it cannot keep sessions.
    """

    key = 'cache'
    default_url = 'cache://default'

    def __init__(
        self,
        uid: str,
        cache: str | None = None,
        timeout: float | None = _NOT_GIVEN,
        *,
        application: Application | None = None,
        **options: Any,
    ):
        if cache is not None and '://' not in cache:
            cache = _url(cache)
        if timeout is not _NOT_GIVEN:
            options['timeout'] = timeout
        self._given = options
        super().__init__(uid, cache, application=application, **options)

    def _open(self) -> None:
        alias, of_url = _parsed(str(self.url))
        key, place = self.settings.storage_location_or_none() or ('', None)
        known = self.settings.storage_options if key == self.key else {}
        options = {**known, **of_url, **self._given}
        unknown = options.keys() - {'timeout', 'local'}
        if unknown:
            raise StorageNotConfigured(
                f'the storage cache has no option {", ".join(sorted(unknown))}; it has timeout '
                'and local'
            )
        self._timeout = _checked(options.get('timeout', DEFAULT_TIMEOUT))
        self._warn_of_timeout(alias)
        self._cache = CacheServer(alias, local=bool(options.get('local')))
        self._versions = Versions(self._cache, self.settings.key_prefix)
        place = place if key == self.key and place else str(self.default_url)
        if _parsed(place)[0] == alias:
            self.url = place
        else:
            self.url = self.elsewhere = _url(alias)

    def _warn_of_timeout(self, alias: str) -> None:
        """Warn, once, of a session that goes before its first lost message is sent again."""
        again = self.settings.redeliver_after
        if self._timeout == FOR_GOOD or int(self._timeout) > 2 * again or alias in _warned:
            return
        _warned.add(alias)
        logger.warning(
            'sessions in the cache %r go %s seconds after their last change, and a message '
            'that the broker has lost is sent again after %g: let timeout be several times '
            'as long as triggers_redeliver_after, and longer than anything waits', alias,
            self._timeout, again,
        )

    # ------------------------------------------------------------- documents

    def load_document(self, name: str) -> tuple[str | None, Any]:
        return self.load_documents([name])[0]

    def load_documents(self, names: Sequence[str]) -> list[tuple[str | None, Any]]:
        return [*self._versions.load(names)]

    def save_document(self, name: str, text: str | None, version: Any) -> bool:
        # What leads to sessions outlives them.
        own = name == self._index.session(self.uid)
        return self._versions.save(name, text, version, self._timeout if own else FOR_GOOD)

    # ------------------------------------------------------ the place as a whole

    @classmethod
    def take_due(
        cls, url: str | None, settings: Settings, *, limit: int, push: int, gap: int
    ) -> Taken:
        """Take what is due in this cache, and in the others of Django's that hold sessions."""
        down: StorageUnavailable | None = None
        own = cls._at(url, settings)
        try:
            taken = super().take_due(url, settings, limit=limit, push=push, gap=gap)
        except StorageUnavailable as exc:
            down, taken = exc, Taken(own.now(), [])
        for other in own._others():
            try:
                if not other._is_used():
                    _unavailable.discard(other.url)
                    continue
                left = limit - len(taken.entries)
                found = super().take_due(other.url, settings, limit=left, push=push, gap=gap)
            except StorageUnavailable as exc:
                # Once, since it may be one that has nothing to do with sessions.
                if other.url not in _unavailable:
                    logger.warning('sessions that are there are not swept: %s', exc)
                    _unavailable.add(other.url)
                continue
            except Exception:
                # What was taken from the own cache must be handed out all the same.
                logger.exception('sessions in %s are not swept', other.url)
                continue
            _unavailable.discard(other.url)
            taken.entries += [due._replace(place=other.url) for due in found.entries]
            taken.more = taken.more or found.more
            dates = [at for at in (taken.next_at, found.next_at) if at is not None]
            taken.next_at = min(dates, default=None)
        if down is not None:
            if not taken.entries:
                raise down
            logger.warning('only other caches are swept: %s', down)
        return taken

    def _others(self) -> Iterator[CacheStorageBackend]:
        """Yield places in the other caches that can keep sessions."""
        for alias in aliases():
            if alias != self._cache.alias:
                with suppress(StorageNotConfigured):
                    yield type(self)._at(_url(alias), self.settings)

    def _is_used(self) -> bool:
        """Tell whether something may be due here."""
        return self._versions.are_there(self._index.due_shards)


def _url(alias: str) -> str:
    return f'cache://{quote(alias, safe="")}'


def _parsed(url: str) -> tuple[str, dict[str, Any]]:
    """Return the alias and the options in a URL."""
    alias, _, query = url.partition('://')[2].partition('?')
    options: dict[str, Any] = dict(parse_qsl(query))
    if str(options.get('local', '')).lower() in ('0', 'false', 'no'):
        options['local'] = False
    if 'timeout' in options:
        text = options['timeout']
        options['timeout'] = None if text.lower() == FOR_GOOD else _number(text)
    return unquote(alias.rstrip('/')) or 'default', options


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _checked(timeout: Any) -> str:
    """Return a timeout as it is kept.

    Raises:
        StorageNotConfigured: It is none.
    """
    if timeout is None:
        return FOR_GOOD
    if (
        isinstance(timeout, (int, float))
        and not isinstance(timeout, bool)
        and 1 <= timeout <= MOST_TIMEOUT
    ):
        # Caches count in whole seconds.
        return str(math.ceil(timeout))
    raise StorageNotConfigured(
        f'the timeout of the storage cache must be seconds, from 1 to {MOST_TIMEOUT}, or None, '
        f'not {timeout!r}'
    )
