"""Ports that nobody listens at."""

from __future__ import annotations

import socket

__all__ = ['free_port']


def free_port() -> int:
    """Return a free port of this host; another program may take it before it is used."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port: int = found.getsockname()[1]
        return port
