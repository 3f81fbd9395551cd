"""Replicas of the shared queue in one process, over a real Redis, one step at a time."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import redis
import redis.asyncio
from prometheus_client import CollectorRegistry
from redis.exceptions import ConnectionError as RedisConnectionError

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, QueueFullError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import Claim, EnqueueResult, QueueLimits, RequestContext
from services.cache_proxy.queue.local.call_limiter import RateLimiter
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.quotas import QuotaProvider, no_quotas
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.replica_session import ReplicaSession
from services.cache_proxy.queue.time_slots import TimeSlotLimiter
from services.cache_proxy.queue.waiters import Waiter, WaiterRegistry
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_keys import QueueKeys
from tests.support.redis_server import wait_for

TIMEOUT_SECONDS = 60.0


def queue_limits(
    *,
    batch_pairs: int = 4,
    batch_bytes: int = 10**6,
    pairs_per_second: float = 0,
    calls_per_second: float = 0,
    linger_seconds: float = 0,
    max_pairs: int = 10**6,
    max_bytes: int = 10**9,
    retry_window_seconds: float = 15,
) -> QueueLimits:
    """Return limits without a rate and a linger, unless given."""
    return QueueLimits(
        batch_pairs=batch_pairs,
        batch_bytes=batch_bytes,
        pairs_per_second=pairs_per_second,
        calls_per_second=calls_per_second,
        linger_seconds=linger_seconds,
        max_pairs=max_pairs,
        max_bytes=max_bytes,
        retry_window_seconds=retry_window_seconds,
    )


def numbered_pair(number: int, *, text: str = "t") -> Pair:
    """Return a test pair whose digest is its number."""
    return Pair(number.to_bytes(16, "big"), f"c{number}", text)


def numbered_pairs(numbers: Iterable[int], *, text: str = "t") -> list[Pair]:
    """Return a test pair for each number."""
    return [numbered_pair(number, text=text) for number in numbers]


def pair_numbers(claim: Claim) -> list[int]:
    """Return the numbers of a batch's pairs, in order."""
    return [int.from_bytes(item.digest, "big") for item in claim.pairs]


def request_context(
    caller: str = "c", priority: str = "interactive", *, timeout: float = TIMEOUT_SECONDS
) -> RequestContext:
    """Return a request context, by default with a timeout of a minute."""
    return RequestContext(caller, priority, asyncio.get_running_loop().time() + timeout)


async def _no_address() -> str:
    return ""


class LossyClient(redis.asyncio.Redis):
    """Client with faults: `lost_replies`: how many of the next scripts' replies are lost.

    `delays`: seconds by which the next scripts are delayed, each on a connection. `max_command_bytes`:
    longer commands fail. `script_flushes`: how many of the next calls are preceded by SCRIPT FLUSH.
    """

    lost_replies = 0
    delays: Sequence[float] = ()
    max_command_bytes = 10**9
    script_flushes = 0

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run the command, with the faults that are due."""
        if self.delays and args[0] == "EVALSHA":
            delay, self.delays = self.delays[0], self.delays[1:]
            await asyncio.sleep(delay)
        if args[0] == "EVALSHA" and sum(len(str(arg)) for arg in args) > self.max_command_bytes:
            message = "the connection broke"
            raise RedisConnectionError(message)
        if args[0] == "EVALSHA" and self.script_flushes:
            self.script_flushes -= 1
            await super().execute_command("SCRIPT FLUSH")  # type: ignore[no-untyped-call]
        reply = await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        if self.lost_replies and args[0] == "EVALSHA":
            self.lost_replies -= 1
            message = "the reply was lost"
            raise RedisConnectionError(message)
        return reply


@dataclass(frozen=True, slots=True)
class QueueLocation:
    """A deployment's queue in Redis, and direct access to its keys."""

    url: str
    keys: QueueKeys

    @classmethod
    def create(cls, url: str, *, namespace: str = "n") -> "QueueLocation":
        """Return a location with a random prefix."""
        return cls(url, QueueKeys(prefix=f"q{secrets.token_hex(6)}", namespace=namespace))

    def with_namespace(self, namespace: str) -> "QueueLocation":
        """Return the location of another model version of the same deployment."""
        prefix = self.keys.limit.partition("}")[0].removeprefix("{")
        return QueueLocation(self.url, QueueKeys(prefix=prefix, namespace=namespace))

    def client(self) -> "redis.Redis":
        """Return a client for direct access."""
        return redis.Redis.from_url(self.url)

    def leftover_keys(self) -> dict[str, Any]:
        """Return the keys of unended pairs and their types, nothing when all have ended."""
        base = self.keys.base
        with self.client() as client:
            found = {
                key.decode().removeprefix(base): client.type(key).decode()
                for key in client.scan_iter(f"{base}*".replace("{", "[{]").replace("}", "[}]"))
            }
            bytes_held = int(client.hget(f"{base}meta", "bytes") or 0)
        # These are bounded in size or time.
        kept = (
            "meta",
            "recent:",
            "refused:",
            "nonsense:",
            "broke:",
            "fair:",
            "quotas",
            "granted:",
        )
        rest: dict[str, Any] = {key: kind for key, kind in found.items() if not key.startswith(kept)}
        return rest | ({"bytes": bytes_held} if bytes_held else {})

    def flush(self) -> None:
        """Delete all keys of this deployment, as FLUSHALL would."""
        prefix = self.keys.limit.partition("}")[0].removeprefix("{")
        with self.client() as client:
            for key in client.scan_iter(f"*{prefix}*"):
                client.delete(key)

    def age_quotas(self, milliseconds: int) -> None:
        """Make the consumption of quotas older."""
        limit = self.keys.limit
        with self.client() as client:
            for account, until in client.zrange(f"{limit}:spent", 0, -1, withscores=True):
                client.zadd(f"{limit}:spent", {account: until - milliseconds})
            client.hincrby(limit, "quotas_since", -milliseconds)

    def age_claims(self, milliseconds: int) -> None:
        """Make the claims older."""
        with self.client() as client:
            for claim_id, packed in client.hgetall(f"{self.keys.base}claims").items():
                claim = msgpack.unpackb(packed, raw=True, strict_map_key=False)
                claim[b"at"] -= milliseconds
                claim[b"lease_until"] -= milliseconds
                client.hset(f"{self.keys.base}claims", claim_id, msgpack.packb(claim, use_bin_type=False))


class Replica:
    """One replica: queue, waiters, session, and a subscription that a test receives from step by step."""

    def __init__(
        self, location: QueueLocation, name: str, bounds: QueueLimits, quotas: QuotaProvider = no_quotas
    ) -> None:
        self.location = location
        self.name = name
        self.limits = bounds
        self.client = cast("LossyClient", LossyClient.from_url(location.url))
        metrics = self.metrics = ProxyMetrics(CollectorRegistry())
        home = QueueNode(self.client, key=location.keys.limit)
        self.scripts = Scripts(home, location.keys, metrics=metrics)
        self.waiters = WaiterRegistry()
        self.resolved: list[tuple[bytes, Outcome]] = []
        self.queue = RedisQueue(
            self.scripts,
            replica=name,
            limits=bounds,
            lease_seconds=30,
            on_outcome=self._on_outcome,
            metrics=metrics,
            quotas=quotas,
            on_model_backoff=self.waiters.fail_with_deadline_before,
        )
        limiter = TimeSlotLimiter(
            RateLimiter(pairs_per_second=0, calls_per_second=0, burst=bounds.batch_pairs, now=0)
        )
        local = LocalQueue(
            bounds,
            limiter=limiter,
            metrics=metrics,
            on_outcome=self.queue.interest.resolve,
            replicas=lambda: limiter.replicas or 1,
            quotas=quotas,
        )
        self.failover = FailoverQueue(shared=self.queue, local=local, limiter=limiter)
        self.session = ReplicaSession(
            home,
            self.scripts,
            queue=self.failover,
            shared=self.queue,
            find_address=_no_address,
            limits=bounds,
            metrics=metrics,
            log_callbacks={},
        )
        self._pubsub = self.client.pubsub(ignore_subscribe_messages=True)

    def _on_outcome(self, digest: bytes, outcome: Outcome) -> None:
        self.resolved.append((digest, outcome))
        self.waiters.resolve(digest, outcome)

    async def subscribe(self) -> "Replica":
        """Subscribe and send a heartbeat."""
        await self._pubsub.subscribe(self.scripts.channel, f"{self.scripts.channel}:{self.name}")
        # Two confirmations of the subscription come first.
        for _ in range(2):
            await self._pubsub.get_message(timeout=TIMEOUT_SECONDS)
        await self.heartbeat()
        return self

    async def close_connections(self) -> None:
        """Close all connections."""
        await self.session._peer_prober.close()
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self.client.aclose()

    async def crash(self) -> None:
        """End without leaving the membership, some time ago."""
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self.client.aclose()
        with self.location.client() as client:
            channel = f"{self.scripts.channel}:{self.name}"
            wait_for(lambda: client.pubsub_numsub(channel)[0][1] == 0, description="the subscription ends")
        self.expire_heartbeat()

    def expire_heartbeat(self) -> None:
        """Make the last heartbeat five seconds old."""
        with self.location.client() as client:
            then = client.time()[0] * 1000 - 5000
            client.zadd(f"{self.location.keys.limit}:replicas", {self.name: then})

    async def receive_messages(self, *, lost: bool = False) -> None:
        """Receive, or lose, all messages until now: those before a marker that this publishes."""
        mark = secrets.token_bytes(16)
        await self.client.publish(f"{self.scripts.channel}:{self.name}", mark)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while (message := await self._pubsub.get_message(timeout=None)) is None or (
                message["data"] != mark
            ):
                if message is not None and not lost:
                    self.session.subscription.apply_message(message["data"])

    async def heartbeat(self) -> None:
        """Send a heartbeat, and recover missed messages."""
        await self.session._heartbeat()
        await self.recover()

    async def recover(self) -> None:
        """Enqueue the waiting pairs again if messages may have been missed."""
        if self.session.subscription.missed.is_set():
            self.session.subscription.missed.clear()
            await self.queue.re_enqueue()

    async def enqueue(
        self, pairs: Sequence[Pair], context: RequestContext | None = None
    ) -> tuple[Waiter, EnqueueResult]:
        """Enqueue as the resolver does. Raises `QueueFullError`."""
        context = context or request_context()
        wait = self.waiters.register([item.digest for item in pairs], deadline=context.deadline)
        try:
            enqueued = await self.queue.enqueue(pairs, context)
        except (QueueFullError, ModelUnavailableError, StoreError):
            await self.cancel(wait)
            raise
        self.waiters.resolve_one(wait, enqueued.outcomes.items())
        return wait, enqueued

    async def cancel(self, waiter: Waiter) -> None:
        """End a request, answered or not."""
        await self.queue.cancel(self.waiters.unregister(waiter))

    async def claim_batch(self) -> Claim:
        """Claim the next batch, which must be due soon."""
        for _ in range(200):
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                return decision
            assert decision.wait_seconds < 5, decision
            await asyncio.sleep(decision.wait_seconds)
        raise AssertionError("no batch")


@asynccontextmanager
async def replicas(
    location: QueueLocation,
    count: int = 1,
    bounds: QueueLimits | None = None,
    quotas: QuotaProvider = no_quotas,
    *,
    first_number: int = 1,
) -> AsyncIterator[list[Replica]]:
    """Open replicas for the length of the block.

    Their names count from `first_number`: no two are the same.
    """
    names = (f"{number:016x}" for number in itertools.count(first_number))
    opened = [Replica(location, next(names), bounds or queue_limits(), quotas) for _ in range(count)]
    try:
        for replica in opened:
            await replica.subscribe()
        yield opened
    finally:
        for replica in opened:
            await replica.close_connections()
