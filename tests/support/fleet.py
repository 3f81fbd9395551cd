"""A fleet: replicas as processes over one Redis (or a Cluster), before one stub whose log is the judge."""

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
    """State: `proxies`, those that a scenario started, also the dead; `flags` of those that start later."""

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
        """Where the stub itself listens."""
        return self._stub.target

    @property
    def model_calls(self) -> list[LoggedCall]:
        """What the model saw so far."""
        return read_calls(self.log)

    def start_replica(self, *flags: str, link: FaultyLink | None = None) -> ServiceProcess:
        """One replica more, which reaches Redis directly or by a wire."""
        proxy = self._stack.enter_context(
            cache_proxy(
                "--model-target",
                self._stub.target,
                "--cache-url",
                link.url if link else self.url,
                "--key-prefix",
                self.key_prefix,
                *flags,
            )
        )
        self.proxies.append(proxy)
        return proxy

    def start_replicas(self, count: int, *flags: str) -> list[ServiceProcess]:
        """So many, and with these flags those that come later."""
        self.default_flags = flags
        return [self.start_replica(*flags) for _ in range(count)]


class Fleet(ProxyGroup):
    """With a Redis of its own."""

    def __init__(self, stack: ExitStack, redis: RedisServer, stub: ServiceProcess, log: Path) -> None:
        super().__init__(stack, redis.url, stub, log)
        self.redis = redis

    def open_link(self) -> FaultyLink:
        """A wire to Redis."""
        return self._stack.enter_context(faulty_link(self.redis.port))


_folder_numbers = itertools.count()


@contextmanager
def fleet(folder: Path, *stub_flags: str, program: str | None = None) -> Iterator[Fleet]:
    """A Redis (of this program), a stub without a limit of its own, and no replica yet."""
    place = folder / f"fleet{next(_folder_numbers)}"
    place.mkdir()
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process(place, "--appendfsync", "everysec", program=program))
        yield Fleet(stack, redis, *_start_stub(stack, place, stub_flags))


@contextmanager
def proxy_group(url: str, folder: Path, *stub_flags: str) -> Iterator[ProxyGroup]:
    """The same, over what is there already."""
    with ExitStack() as stack:
        yield ProxyGroup(stack, url, *_start_stub(stack, folder, stub_flags))


def _start_stub(stack: ExitStack, folder: Path, flags: Sequence[str]) -> tuple[ServiceProcess, Path]:
    log = folder / "calls.jsonl"
    started = model_stub("--rate", "0", "--latency", "50ms", "--log", str(log), *flags)
    return stack.enter_context(started), log
