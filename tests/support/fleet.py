"""A fleet: replica processes that share one Redis (or a Cluster) and one model stub, whose log is checked."""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.call_log import LoggedCall, read_calls
from tests.support.faulty_link import FaultyLink, faulty_link
from tests.support.processes import ServiceProcess, cache_proxy, model_stub
from tests.support.redis_server import RedisServer, redis_process


class ProxyGroup:
    """Replicas over one Redis.

    State: `proxies`, all replicas that were started, dead ones included; `default_flags`, the flags of
    replicas that a scenario starts later.
    """

    def __init__(self, stack: ExitStack, url: str, stub: ServiceProcess, log: Path) -> None:
        self.url = url
        self.log = log
        self.proxies: list[ServiceProcess] = []
        self._stub = stub
        self._stack = stack
        self.default_flags: tuple[str, ...] = ()
        self.key_prefix = f"fleet{secrets.token_hex(4)}"

    @property
    def model_target(self) -> str:
        """Return the address of the model stub."""
        return self._stub.target

    @property
    def model_calls(self) -> list[LoggedCall]:
        """Return the calls that the model has received so far."""
        return read_calls(self.log)

    def start_replica(self, *flags: str, link: FaultyLink | None = None) -> ServiceProcess:
        """Start one replica, which reaches Redis directly or through a link."""
        proxy = self._stack.enter_context(
            cache_proxy(
                *("--model-target", self._stub.target),
                *("--cache-url", link.url if link else self.url),
                *("--key-prefix", self.key_prefix),
                *flags,
            )
        )
        self.proxies.append(proxy)
        return proxy

    def start_replicas(self, count: int, *flags: str) -> list[ServiceProcess]:
        """Start `count` replicas. Replicas that are started later get the same flags."""
        self.default_flags = flags
        return [self.start_replica(*flags) for _ in range(count)]


class Fleet(ProxyGroup):
    """Replicas over a Redis process of the test."""

    def __init__(self, stack: ExitStack, redis: RedisServer, stub: ServiceProcess, log: Path) -> None:
        super().__init__(stack, redis.url, stub, log)
        self.redis = redis

    def open_link(self) -> FaultyLink:
        """Open a link to Redis that can fail."""
        return self._stack.enter_context(faulty_link(self.redis.port))


_folder_numbers = itertools.count()


@contextmanager
def fleet(folder: Path, *stub_flags: str, program: str | None = None) -> Iterator[Fleet]:
    """Run Redis (this program) and a model stub without a rate limit. No replica is started."""
    own_folder = folder / f"fleet{next(_folder_numbers)}"
    own_folder.mkdir()
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process(own_folder, "--appendfsync", "everysec", program=program))
        yield Fleet(stack, redis, *_start_stub(stack, own_folder, stub_flags))


@contextmanager
def proxy_group(url: str, folder: Path, *stub_flags: str) -> Iterator[ProxyGroup]:
    """Run a model stub without a rate limit, for replicas over the Redis at this URL."""
    with ExitStack() as stack:
        yield ProxyGroup(stack, url, *_start_stub(stack, folder, stub_flags))


def _start_stub(stack: ExitStack, folder: Path, flags: Sequence[str]) -> tuple[ServiceProcess, Path]:
    log = folder / "calls.jsonl"
    stub = model_stub("--rate", "0", "--latency", "50ms", "--log", str(log), *flags)
    return stack.enter_context(stub), log
