"""A TCP proxy before a server: it counts round trips, holds back, cuts and refuses."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa

__all__ = ['DatabaseProxy', 'Proxy', 'SilentServer']

P = TypeVar('P', bound='Proxy')

#: How often a thread looks whether it is to end or to go on, in seconds.
TICK = 0.01


class Proxy:
    """Forwards connections to a server, each in a thread of its own.

    Attributes:
        trips: How often a client sent something after the server had said something: the round
            trips, the handshakes of connections included.
        lose_answer_to: Something that a client will say: it is forwarded, but the answer is
            kept and the connection cut, once.
        breaks_then: Whether nobody can connect any more after that until :meth:`mend`.
        cut_after: After how many bytes of its client's each connection is cut; 0: never.
        port: Where it listens.
    """

    def __init__(self, host: str, port: int):
        self._server = (host, port)
        self.trips = 0
        self.cut_after = 0
        self.lose_answer_to: bytes | None = None
        self.breaks_then = False
        self._frozen = threading.Event()
        self._broken = threading.Event()
        self._closed = threading.Event()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.create_server(('127.0.0.1', port))
        listener.settimeout(TICK)
        return listener

    def freeze(self) -> None:
        """Forward nothing from now on; new connections are taken, and not forwarded either."""
        self._frozen.set()

    def break_(self) -> None:
        """Cut every connection, and close new ones at once."""
        self._broken.set()

    def refuse(self) -> None:
        """Cut every connection, and let nobody connect: nothing listens here."""
        self._broken.set()
        self._listener.close()

    def mend(self) -> None:
        """Forward what was held back, if its sender is still there, and all that comes."""
        if self._listener.fileno() == -1:
            self._listener = self._listen(self.port)
        self._broken.clear()
        self._frozen.clear()

    def close(self) -> None:
        """Close everything and wait for the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- threads

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # It is closed: nobody may connect for now.
                self._closed.wait(TICK)
                continue
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._broken.is_set():
                return
            with socket.create_connection(self._server) as server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Where one side is gone, so is the connection.
                with contextlib.suppress(OSError):
                    self._forward(client, server)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        others, spoke, losing = {client: server, server: client}, server, False
        sent = 0
        with selectors.DefaultSelector() as selector:
            for end in others:
                selector.register(end, selectors.EVENT_READ)
            while self._goes_on():
                for ready, _ in selector.select(TICK):
                    end: Any = ready.fileobj
                    data = end.recv(65536)
                    if not data or not self._goes_on():
                        return
                    if end is server and losing:
                        self.lose_answer_to = None
                        if self.breaks_then:
                            self.break_()
                        return
                    sent += len(data) if end is client else 0
                    if 0 < self.cut_after < sent:
                        return
                    losing = self._is_to_be_lost(data)
                    self.trips += end is client and spoke is server
                    spoke = end
                    others[end].sendall(data)

    def _goes_on(self) -> bool:
        """Wait as long as this is frozen; tell whether anything is to be forwarded then."""
        while self._frozen.is_set() and not self._closed.is_set():
            self._closed.wait(TICK)
        return not self._closed.is_set() and not self._broken.is_set()

    def _is_to_be_lost(self, data: bytes) -> bool:
        return self.lose_answer_to is not None and self.lose_answer_to in data


class DatabaseProxy(Proxy):
    """A proxy before a database server."""

    def __init__(self, url: str):
        self._url = sa.make_url(url)
        usual = 5432 if self._url.get_backend_name() == 'postgresql' else 3306
        super().__init__(self._url.host or '127.0.0.1', self._url.port or usual)

    @property
    def through(self) -> str:
        """The URL by which clients go through here."""
        url = self._url.set(host='127.0.0.1', port=self.port)
        return url.render_as_string(hide_password=False)


class SilentServer:
    """Listens, takes connections and never says a word."""

    def __init__(self) -> None:
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> SilentServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
