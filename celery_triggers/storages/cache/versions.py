"""Documents in a cache, which has no compare-and-swap: ``add`` is used as one.

Each document is a chain of versions::

    <prefix>:<hash>                  the pointer: '<chain> <number> <oldest>', a version that
                                     was the newest, and the oldest that may not be marked yet;
                                     '<chain> 0 <version>' is the first version itself
    <prefix>:<hash>:<chain>:<n>      version n

The next version of a document is whatever is added under the next number: one process can.
Then the pointer is set, and the version before becomes a mark that its number is taken: a
process that was held up between reading and adding must find it, and a reader whose pointer
lags goes on from there, and sets it. A chain has a random name, so that what was evicted and
begins again never meets what was read before.

A version is '<timeout> <random> <random of the one before> <text>', without a text where the
document was removed.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol
from urllib.parse import quote

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable

__all__ = ['FOR_GOOD', 'Cache', 'Version', 'Versions']

#: For how many seconds a number certainly stays taken, and for how many of them a process
#: trusts what it has read.
MARKED = 3600
STALE = MARKED / 2

#: So many marks stay for as long as their document, so many again for a while.
BATCH = 64

#: After so many seconds a pointer is looked at again that was set: so many newer versions may
#: have come before it that some have no marks any more.
SLOW = 0.02

#: From how many versions on a pointer that lags is set by whoever reads it. Without a mark
#: in between, nobody would find the newest.
MOST_LAG = 2

#: How often a version is added that is neither there afterwards nor taken.
MOST_ADDS = 5

_MARK = '-'

#: Stands for no timeout.
FOR_GOOD = 'none'


class Cache(Protocol):
    """What is asked of a cache; timeouts are seconds, ``None``: never."""

    alias: str

    def get(self, key: str) -> str | None:
        """Return a value, ``None`` if there is none."""

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the values of those keys that there are."""

    def add(self, key: str, value: str, timeout: float | None) -> bool:
        """Set a value unless there is one, as one atomic act; tell whether it was set."""

    def set(self, key: str, value: str, timeout: float | None) -> None:
        """Set a value."""

    def set_many(self, values: Mapping[str, str], timeout: float | None) -> None:
        """Set values."""


class Version(NamedTuple):
    """A version of a document as it was read.

    Attributes:
        oldest: The oldest number that may not be marked.
        read_at: When, by this host's clock.
        random: Tells the version from any other; ``''`` where it was evicted.
        kept: The document's timeout; ``''`` where there is no document.
    """

    chain: str
    number: int
    oldest: int
    read_at: float
    random: str = ''
    kept: str = ''


class _Found(NamedTuple):
    """The newest version of a document, as it stands in the cache."""

    value: str
    chain: str
    number: int
    oldest: int
    read_at: float


class Versions:
    """The documents in a cache.

    Args:
        prefix: Begins the keys.
    """

    def __init__(self, cache: Cache, prefix: str):
        self._cache = cache
        self._prefix = quote(prefix, safe='')[:60]

    def load(self, names: Sequence[str]) -> list[tuple[str | None, Version | None]]:
        """Load documents; return the text and the version of each."""
        found = self._load([self.pointer(name) for name in names])
        return [self._understood(one) for one in found]

    def are_there(self, names: Sequence[str]) -> bool:
        """Tell whether there is, or was lately, one of these documents."""
        return bool(self._cache.get_many([self.pointer(name) for name in names]))

    def pointer(self, name: str) -> str:
        """Return the key of a document's pointer: for Memcached, short and without spaces."""
        digest = hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()
        return f'{self._prefix}:{digest[:40]}'

    def _load(self, bases: list[str], *, again: bool = False) -> list[_Found | None]:
        read_at = time.time()
        pointers = self._cache.get_many(bases)
        values = self._cache.get_many(
            [key for base, pointer in pointers.items() for key in _around(base, pointer)]
        )
        found: list[_Found | None] = []
        for base in bases:
            one = None
            if base in pointers:
                one = self._newest(base, pointers[base], values, read_at)
                if one.value == _MARK and not again:
                    # It was evicted, or newer ones have come while this process was held up.
                    [one] = self._load([base], again=True)
                elif one.value != _MARK and one.number - _pointed(pointers[base])[1] >= MOST_LAG:
                    self._catch_up(base, one, read_at)
            found.append(one)
        return found

    def _newest(
        self, base: str, pointer: str, values: dict[str, str], read_at: float
    ) -> _Found:
        """Return the newest version.

        Args:
            values: What there is around the version that the pointer leads to.
        """
        chain, pointed, rest = _pointed(pointer)
        number, asked = pointed, pointed + 1
        value = values.get(_key(base, chain, pointed), _MARK) if pointed else rest
        marked = values.get(_key(base, chain, pointed - 1), _MARK) == _MARK
        while True:
            while (following := values.get(_key(base, chain, number + 1))) is not None:
                number, value = number + 1, following
            if number < asked:
                break
            values = self._cache.get_many(_keys(base, chain, number + 1, BATCH))
            asked = number + BATCH
        return _Found(value, chain, number, pointed if marked else int(rest), read_at)

    @staticmethod
    def _understood(found: _Found | None) -> tuple[str | None, Version | None]:
        if found is None:
            return None, None
        if found.value == _MARK:
            return None, Version(*found[1:])
        kept, token, _, text = found.value.split(' ', 3)
        return text or None, Version(*found[1:], token, kept if text else '')

    def save(self, name: str, text: str | None, version: Version | None, kept: str) -> bool:
        """Replace or remove a document if it still has this version.

        A document keeps the timeout that it has.

        Args:
            kept: The timeout of a new document, in whole seconds or :data:`FOR_GOOD`.

        Returns:
            Whether it was replaced. If it was not, nothing has changed.
        """
        base = self.pointer(name)
        kept = (version.kept if version is not None else '') or kept
        # Unlike any other, to be known again.
        token, before = secrets.token_hex(4), version.random if version is not None else ''
        value = f'{kept} {token} {before} {text or ""}'
        if version is None:
            pointer = f'{secrets.token_hex(8)} 0 {value}'
            return text is None or self._add(base, pointer, _seconds(kept))
        if _is_stale(version):
            return False
        timeout = _seconds(kept) if text is not None else MARKED
        number = version.number + 1
        pointer = f'{version.chain} {number} {version.oldest}'
        began = time.time()
        if not self._add(_key(base, version.chain, number), value, timeout):
            return False
        if not self._is_next(base, version, pointer, timeout, token):
            self._mark(base, version.chain, number, number + 1, MARKED)
            return False
        if not _is_stale(version):
            # Else the pointer lags, and nothing is marked that it needs.
            self._set_pointer(base, pointer, timeout, began, removed=text is None)
            self._mark_before(base, version, timeout)
        if text is None:
            self._mark(base, version.chain, number - 2 * BATCH, number, MARKED)
        return True

    def _is_next(
        self, base: str, version: Version, pointer: str, timeout: float | None, token: str
    ) -> bool:
        """Tell whether a version was the newest when the one after it was added.

        If not, no mark was left to tell: it is outdated, or marks were evicted.
        """
        before = _key(base, version.chain, version.number)
        found = self._cache.get_many([base, before])
        standing = found.get(base)
        if version.number == 0 and standing is not None and _pointed(standing)[1] == 0:
            found[before] = _pointed(standing)[2]
        # The version before is marked only when there is one after it.
        certain = bool(version.random) and version.random in found.get(before, '')[:40]
        trusted = certain or not _is_stale(version)
        if standing is None and trusted:
            if self._add(base, pointer, timeout):
                return True
            standing = self._cache.get(base)
        chain, pointed, _ = _pointed(standing) if standing else (version.chain, 0, '')
        if chain != version.chain:
            return False
        if standing and trusted and pointed <= version.number + 1:
            return True
        return self._is_followed(base, version, token)

    def _is_followed(self, base: str, version: Version, token: str) -> bool:
        """Tell whether others have gone on from the version after this one.

        Raises:
            StorageUnavailable: Neither is left any more.
        """
        own, after = _keys(base, version.chain, version.number + 1, 2)
        found = self._cache.get_many([own, after])
        if own not in found:
            raise StorageUnavailable(
                'this process was held up for so long that nobody knows any more whether its '
                f'change was one (cache {self._cache.alias!r})', outcome_unknown=True,
            )
        if found.get(after) == _MARK:
            # Numbers are marked in their order, but perhaps not read so.
            return self._cache.get(own) == _MARK
        if found[own] == _MARK:
            return True
        return after in found and found[after].split(' ', 3)[2] == token

    def _catch_up(self, base: str, found: _Found, read_at: float) -> None:
        """Set a pointer that lags: whoever should have done it is slow, or dead."""
        pointer = f'{found.chain} {found.number} {found.oldest}'
        with suppress(StorageUnavailable, StorageNotConfigured):
            # Reading needs none of this, and may be done where nothing may be written.
            self._set_pointer(base, pointer, _lifetime(found.value), read_at)

    def _set_pointer(
        self, base: str, pointer: str, timeout: float | None, began: float, *, removed: bool = False
    ) -> None:
        """Let the pointer lead to a version.

        Args:
            began: When that was the newest, or not yet there.
            removed: Whether it has no text. What others begin after it lives longer.
        """
        self._cache.set(base, pointer, timeout)
        while removed or time.time() - began > SLOW:
            removed, began = False, time.time()
            values = self._cache.get_many(_around(base, pointer))
            newest = self._newest(base, pointer, values, began)
            if newest.number == _pointed(pointer)[1]:
                break
            pointer = f'{newest.chain} {newest.number} {newest.oldest}'
            self._cache.set(base, pointer, _lifetime(newest.value))

    def _mark_before(self, base: str, version: Version, timeout: float | None) -> None:
        """Mark the versions before the one after this; let old marks go after a while."""
        number = version.number + 1
        self._mark(base, version.chain, version.oldest, number, timeout and timeout + MARKED)
        if number % BATCH == 0:
            self._mark(base, version.chain, number - 2 * BATCH, number - BATCH, MARKED)

    def _mark(
        self, base: str, chain: str, first: int, end: int, timeout: float | None
    ) -> None:
        keys = _keys(base, chain, max(first, 1), end - max(first, 1))
        self._cache.set_many(dict.fromkeys(keys, _MARK), timeout)

    def _add(self, key: str, value: str, timeout: float | None) -> bool:
        """Add a key; tell whether it holds this value now.

        Raises:
            StorageUnavailable: It was not added, and is not there either.
        """
        for attempt in range(MOST_ADDS):
            if self._cache.add(key, value, timeout):
                return True
            standing = self._cache.get(key)
            if standing is not None:
                # A client that got no answer may have asked again.
                return standing == value
            # A database that is locked for a moment looks like this, too.
            time.sleep(random.uniform(0, 0.01 * 2**attempt))
        raise StorageUnavailable(
            f'the cache {self._cache.alias!r} does not keep {len(value)} bytes, and does not '
            'say why; perhaps it is down, or takes no values of this size'
        )


def _is_stale(version: Version) -> bool:
    return time.time() - version.read_at > STALE


def _key(base: str, chain: str, number: int) -> str:
    return f'{base}:{chain}:{number}'


def _keys(base: str, chain: str, first: int, count: int) -> list[str]:
    return [_key(base, chain, number) for number in range(first, first + count)]


def _pointed(pointer: str) -> tuple[str, int, str]:
    """Return the chain, the number, and the oldest one or the version in a pointer."""
    chain, number, rest = pointer.split(' ', 2)
    return chain, int(number), rest


def _around(base: str, pointer: str) -> list[str]:
    chain, number, _ = _pointed(pointer)
    return _keys(base, chain, number - 1, 3)


def _seconds(kept: str) -> int | None:
    return None if kept == FOR_GOOD else int(kept)


def _lifetime(value: str) -> int | None:
    """Return for how long a pointer to a version is needed."""
    if value == _MARK:
        return MARKED
    kept, _, _, text = value.split(' ', 3)
    return _seconds(kept) if text else MARKED
