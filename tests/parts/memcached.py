"""A Memcached of the tests' own, at a socket that nobody else uses."""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import socket
import subprocess
from functools import cache
from pathlib import Path

from tests.parts.waiting import eventually

#: Ends the server also when the process that started it was killed: its end of the pipe closes.
_GUARD = '"$@" & read _; kill $!; wait $!'


def missing() -> str:
    """Return what is not there, or ``''``."""
    return '' if shutil.which('memcached') else 'memcached is not installed'


@cache
def start() -> None:
    """Start the server, unless it runs; it ends with this process."""
    from tests.django_settings import MEMCACHED

    path = MEMCACHED.removeprefix('unix:')
    if path == MEMCACHED or listens(path):
        return
    run(['-s', path, '-m', '256'])
    eventually(lambda: listens(path), 'Memcached listens')


def run(options: list[str]) -> subprocess.Popen[bytes]:
    """Run a server; closing its standard input ends it."""
    # As root it wants to be told that it may.
    command = ['memcached', *options, '-U', '0', '-u', getpass.getuser()]
    server = subprocess.Popen(
        ['sh', '-c', _GUARD, 'sh', *command], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(_end, server, os.getpid())
    return server


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait(10)


def _end(server: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and server.poll() is None:
        end(server)


def listens(path: str) -> bool:
    """Tell whether a server listens at a socket."""
    if not Path(path).exists():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
