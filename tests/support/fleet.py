"""A fleet: replicas as processes over one Redis (or a Cluster), before one stub whose log is the judge."""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.call_log import Call, calls_of
from tests.support.faulty_link import Wire, wire_to
from tests.support.processes import Service, cache_proxy, model_stub
from tests.support.redis_server import RedisServer, redis_process


class Proxies:
    """State: `proxies`, those that a scenario started, also the dead; `flags` of those that start later."""

    def __init__(self, stack: ExitStack, url: str, stub: Service, log: Path) -> None:
        self.url = url
        self.log = log
        self.proxies: list[Service] = []
        self._stub = stub
        self._stack = stack
        self.flags: tuple[str, ...] = ()
        self.prefix = f"fleet{secrets.token_hex(4)}"

    @property
    def model(self) -> str:
        """Where the stub itself listens."""
        return self._stub.target

    @property
    def calls(self) -> list[Call]:
        """What the model saw so far."""
        return calls_of(self.log)

    def start(self, *flags: str, wire: Wire | None = None) -> Service:
        """One replica more, which reaches Redis directly or by a wire."""
        proxy = self._stack.enter_context(
            cache_proxy(
                "--model-target", self._stub.target, "--cache-url", wire.url if wire else self.url,
                "--key-prefix", self.prefix, *flags,
            )
        )  # fmt: skip
        self.proxies.append(proxy)
        return proxy

    def start_all(self, count: int, *flags: str) -> list[Service]:
        """So many, and with these flags those that come later."""
        self.flags = flags
        return [self.start(*flags) for _ in range(count)]


class Fleet(Proxies):
    """With a Redis of its own."""

    def __init__(self, stack: ExitStack, redis: RedisServer, stub: Service, log: Path) -> None:
        super().__init__(stack, redis.url, stub, log)
        self.redis = redis

    def wire(self) -> Wire:
        """A wire to Redis."""
        return self._stack.enter_context(wire_to(self.redis.port))


_numbers = itertools.count()


@contextmanager
def fleet(folder: Path, *stub_flags: str, program: str | None = None) -> Iterator[Fleet]:
    """A Redis (of this program), a stub without a limit of its own, and no replica yet."""
    place = folder / f"fleet{next(_numbers)}"
    place.mkdir()
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process(place, "--appendfsync", "everysec", program=program))
        yield Fleet(stack, redis, *_stub(stack, place, stub_flags))


@contextmanager
def fleet_at(url: str, folder: Path, *stub_flags: str) -> Iterator[Proxies]:
    """The same, over what is there already."""
    with ExitStack() as stack:
        yield Proxies(stack, url, *_stub(stack, folder, stub_flags))


def _stub(stack: ExitStack, folder: Path, flags: Sequence[str]) -> tuple[Service, Path]:
    log = folder / "calls.jsonl"
    started = model_stub("--rate", "0", "--latency", "50ms", "--log", str(log), *flags)
    return stack.enter_context(started), log
