"""Every decision of a run is one number; a run is repeated by repeating its numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence


class Choices:
    """Draws numbers from a seed, or from a recording.

    0 is always the benign choice: no fault, the first process. A recording that is over
    goes on with 0, so every list of numbers is a run.

    Args:
        seed: Of the random numbers.
        recorded: The numbers of an earlier run, instead of random ones.

    Attributes:
        taken: What was drawn so far.
    """

    def __init__(self, seed: int = 0, recorded: Sequence[int] | None = None):
        self.taken: list[int] = []
        self._random = random.Random(seed)
        self._recorded = None if recorded is None else iter(recorded)

    def draw(self, count: int) -> int:
        """Return one of ``range(count)``, each as likely as the others."""
        if count <= 1:
            return 0
        if self._recorded is not None:
            value = min(next(self._recorded, 0), count - 1)
        else:
            value = int(self._random.random() * count)
        self.taken.append(value)
        return value

    def rarely(self, chance: float, count: int = 1) -> int:
        """Return 0, or with this chance one of ``1 .. count``."""
        if self._recorded is not None:
            value = min(next(self._recorded, 0), count)
        else:
            value = 0
            if self._random.random() < chance:
                value = 1 + int(self._random.random() * count)
        self.taken.append(value)
        return value


def shrink(
    choices: Sequence[int], fails: Callable[[list[int]], Sequence[int] | None], seconds: float = 20
) -> list[int]:
    """Return a smaller list of choices that still fails.

    Args:
        fails: Runs choices; returns those that were really taken if the run fails in the
            same way, else ``None``.
        seconds: How long to look for something smaller at most.
    """
    return _Shrinking(choices, fails, time.monotonic() + seconds).smallest()


class _Shrinking:
    """Makes a list smaller by cutting, deleting, zeroing and lowering, until nothing helps."""

    def __init__(
        self,
        choices: Sequence[int],
        fails: Callable[[list[int]], Sequence[int] | None],
        deadline: float,
    ):
        self.best = _trimmed(choices)
        self.fails = fails
        self.deadline = deadline

    def smallest(self) -> list[int]:
        before = None
        while before != self.best and time.monotonic() < self.deadline:
            before = self.best
            self._cut()
            self._zero()
            self._delete()
            self._lower()
        return self.best

    def _try(self, candidate: list[int]) -> bool:
        candidate = _trimmed(candidate)
        if _size(candidate) >= _size(self.best) or time.monotonic() > self.deadline:
            return False
        taken = self.fails(candidate)
        if taken is None:
            return False
        # What was taken can be shorter, or lower where a value was beyond its range.
        self.best = min(candidate, _trimmed(taken), key=_size)
        return True

    def _cut(self) -> None:
        length = len(self.best) // 2
        while length:
            if not self._try(self.best[:-length]):
                length //= 2
            length = min(length, len(self.best))

    def _zero(self) -> None:
        """Set many of the numbers that are not 0 to 0 together, then fewer."""
        chunk = max(1, len(self.best) // 2)
        while chunk:
            start = 0
            while start < len(self.best):
                part = self.best[start : start + chunk]
                if any(part):
                    self._try(
                        self.best[:start] + [0] * len(part) + self.best[start + chunk :]
                    )
                start += chunk
            chunk //= 2

    def _delete(self) -> None:
        for chunk in (64, 16, 8, 4, 2, 1):
            start = len(self.best) - chunk
            while start >= 0:
                self._try(self.best[:start] + self.best[start + chunk :])
                start -= chunk

    def _lower(self) -> None:
        for index in range(len(self.best)):
            if index >= len(self.best):
                return
            value = self.best[index]
            for lower in sorted({1, value // 2, value - 1}):
                if 0 < lower < value and self._try(
                    [*self.best[:index], lower, *self.best[index + 1 :]]
                ):
                    break


def _trimmed(choices: Sequence[int]) -> list[int]:
    """Return choices without the zeros at their end, which say nothing."""
    end = len(choices)
    while end and not choices[end - 1]:
        end -= 1
    return list(choices[:end])


def _size(choices: Sequence[int]) -> tuple[int, int, int]:
    """Return what is to become smaller: what is not benign, then the length, then the sum."""
    return sum(1 for value in choices if value), len(choices), sum(choices)
