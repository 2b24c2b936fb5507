"""Files to which many processes append lines, also processes that are about to be killed.

A line is written by one ``write`` to a file opened with ``O_APPEND``: the kernel keeps it
whole and in order, and a SIGKILL right after it takes nothing back.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def now() -> int:
    """Return nanoseconds since the machine was started, the same in all its processes."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Journal:
    """The journals of one arena, each a file of JSON lines.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write(self, name: str, **facts: Any) -> None:
        """Append a line; ``at``, ``wall``, ``pid`` and ``ppid`` are added to it."""
        facts = {
            'at': now(), 'wall': time.time(), 'pid': os.getpid(), 'ppid': os.getppid(), **facts,
        }
        line = json.dumps(facts, separators=(',', ':'), default=str) + '\n'
        flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
        handle = os.open(self.folder / f'{name}.jsonl', flags, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return all lines in the order in which they were written."""
        return Tail(self.folder / f'{name}.jsonl').more()


class Tail:
    """Reads what has been appended to a file since it was last asked."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0

    def more(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open('rb') as file:
            file.seek(self._offset)
            whole = file.read()
        # A line may just be under way.
        end = whole.rfind(b'\n') + 1
        self._offset += end
        return [json.loads(line) for line in whole[:end].splitlines()]
