"""Private servers that tests may kill, freeze and start again, and a proxy between.

Nothing here touches the servers that others share. Each server is a process group of its
own, and exactly that is ended.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kombu
import redis

from tests.chaos.nursery import Nursery
from tests.parts.ports import free_port
from tests.parts.redis_servers import program
from tests.parts.waiting import eventually

PATIENCE = float(os.environ.get('TRIGGERS_TEST_PATIENCE', '90'))


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
            program(), '--port', str(self.port), '--bind', '127.0.0.1', '--dir',
            str(self.folder), '--save', '', '--appendonly', 'yes', '--appendfsync', 'always',
        ], {}

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


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
