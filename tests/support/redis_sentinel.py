"""Real Sentinels for tests, which watch one master."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import redis

from tests.support.redis_server import RedisServer, local_server_program, wait_for

_SENTINELS = 3


class SentinelServer(RedisServer):
    """A Sentinel that watches one master, with its settings in `folder`."""

    def __init__(
        self,
        program: str,
        folder: Path,
        *,
        settings: Sequence[str] = (),
        master_port: int,
        master_name: str,
        quorum: int,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        super().__init__(program, folder)
        self._master_name = master_name
        self._username = username
        self._password = password
        path = folder / "sentinel.conf"
        path.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {master_name} 127.0.0.1 {master_port} {quorum}\n"
            f"sentinel down-after-milliseconds {master_name} 500\n"
            f"sentinel failover-timeout {master_name} 2000\n" + "".join(f"{line}\n" for line in settings)
        )
        self._command = [program, str(path), "--sentinel"]

    def client(self) -> "redis.Redis":
        """Return a new client."""
        return redis.Redis(port=self.port, username=self._username, password=self._password, socket_timeout=5)

    def _is_answering(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.sentinel_slaves(self._master_name))
        except redis.RedisError:
            return False


@contextmanager
def sentinel_servers(
    folder: Path, *settings: str, master_port: int, master_name: str, program: str | None = None
) -> Iterator[list[SentinelServer]]:
    """Run three Sentinels with a quorum of two."""
    with ExitStack() as stack:
        servers = []
        for number in range(_SENTINELS):
            sentinel_folder = folder / f"sentinel{number}"
            sentinel_folder.mkdir()
            servers.append(
                SentinelServer(
                    program or local_server_program(),
                    sentinel_folder,
                    settings=settings,
                    master_port=master_port,
                    master_name=master_name,
                    quorum=2,
                )
            )
            servers[-1].start()
            stack.callback(servers[-1].kill)
        for server in servers:
            wait_for(
                partial(_sees_other_sentinels, server, master_name),
                description="the Sentinels know each other",
            )
        yield servers


@contextmanager
def run_sentinels(
    folder: Path, *settings: str, master_port: int, master_name: str, program: str | None = None
) -> Iterator[list[int]]:
    """Run three Sentinels with a quorum of two, and yield their ports."""
    with sentinel_servers(
        folder, *settings, master_port=master_port, master_name=master_name, program=program
    ) as servers:
        yield [server.port for server in servers]


def _sees_other_sentinels(server: SentinelServer, master_name: str) -> bool:
    with server.client() as client:
        return len(client.sentinel_sentinels(master_name)) == _SENTINELS - 1


@contextmanager
def single_sentinel(
    folder: Path,
    *settings: str,
    master_port: int,
    master_name: str,
    program: str | None = None,
    username: str | None = None,
    password: str | None = None,
) -> Iterator[int]:
    """Run one Sentinel with a quorum of one, and yield its port.

    The test itself logs in with `username` and `password`.
    """
    server = SentinelServer(
        program or local_server_program(),
        folder,
        settings=settings,
        master_port=master_port,
        master_name=master_name,
        quorum=1,
        username=username,
        password=password,
    )
    server.start()
    try:
        yield server.port
    finally:
        server.kill()
