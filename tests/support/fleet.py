"""A fleet: replicas as processes over one Redis, before one stub whose log is the judge."""

import itertools
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.judge import Call, calls_of
from tests.support.processes import Service, cache_proxy, model_stub
from tests.support.redis_server import RedisServer, redis_process
from tests.support.wire import Wire, wire_to


class Fleet:
    """State: `proxies`, those that a scenario started, also the dead; `flags` of those that start later."""

    def __init__(self, stack: ExitStack, redis: RedisServer, stub: Service, log: Path) -> None:
        self.redis = redis
        self.log = log
        self.proxies: list[Service] = []
        self._stub = stub
        self._stack = stack
        self.flags: tuple[str, ...] = ()
        self._prefix = f"fleet{secrets.token_hex(4)}"

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
                "--model-target", self._stub.target, "--cache-url", wire.url if wire else self.redis.url,
                "--key-prefix", self._prefix, *flags,
            )
        )  # fmt: skip
        self.proxies.append(proxy)
        return proxy

    def wire(self) -> Wire:
        """A wire to Redis."""
        return self._stack.enter_context(wire_to(self.redis.port))

    def start_all(self, count: int, *flags: str) -> list[Service]:
        """So many, and with these flags those that come later."""
        self.flags = flags
        return [self.start(*flags) for _ in range(count)]


_numbers = itertools.count()


@contextmanager
def fleet(folder: Path, *stub_flags: str, program: str | None = None) -> Iterator[Fleet]:
    """A Redis (of this program), a stub without a limit of its own, and no replica yet."""
    place = folder / f"fleet{next(_numbers)}"
    place.mkdir()
    log = place / "calls.jsonl"
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process(place, "--appendfsync", "everysec", program=program))
        stub = stack.enter_context(
            model_stub("--rate", "0", "--latency", "50ms", "--log", str(log), *stub_flags)
        )
        yield Fleet(stack, redis, stub, log)
