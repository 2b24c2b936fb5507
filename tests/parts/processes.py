"""Processes that tests start and end, by their ids; and forked children."""

from __future__ import annotations

import os
import signal
import subprocess

PATIENCE = 15


def end(process: subprocess.Popen[bytes]) -> None:
    """End a worker that leads a process group, with its children if it does not leave."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
