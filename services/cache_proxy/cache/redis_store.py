"""The store on Redis or Valkey: hash buckets, and one script call for a batch (on a Cluster, for a tag)."""

import asyncio
import itertools
import logging
import sys
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.cache_proxy.batching import Riders
from services.cache_proxy.cache.buckets import (
    COLUMNS,
    FIELD,
    TAGS,
    TagState,
    entry_of_value,
    state_key,
    tag_of,
)
from services.cache_proxy.cache.cache_scripts import CLEAR, FORGET, GET, INSPECT, PUT, SWEEP, Script
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import Call, Servers, SlotMoving
from services.cache_proxy.redis_client.values import read_integer

_log = logging.getLogger(__name__)

# A script call of these sizes holds Redis for 2 to 3 ms.
_GET_PAIRS = 1000
_PUT_PAIRS = 334
_CLUSTER_PAIRS = 4000  # which is 60 a tag
_MAX_OPERATIONS = 16
_TELLING_PAIRS = 4 * TAGS  # a look-up of so many is about every node
_MAX_BUCKETS = 2**53  # of a tag, as Lua's numbers are exact


@dataclass(frozen=True, slots=True)
class Swept:
    """What a step of the sweep found: pairs removed, and whether earlier generations have left something."""

    removed: int
    more: bool


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a tag holds; `samples` are (encoding, pairs, bytes) of some of its buckets."""

    generation: str
    buckets: int
    pairs: int
    leftovers: bool
    garbage: int
    samples: list[tuple[str, int, int]]


class RedisStore:
    """Looks up and remembers whole batches; every script may be repeated, so one retry is safe.

    State: `_failures`, so that whoever waited behind a server that fell silent does not wait for it too;
    `_is_partial`, whether a node of several did not reply when it was last asked.
    """

    def __init__(
        self, servers: Servers, *, base: str, metrics: ProxyMetrics, clock: StoreClock | None = None
    ) -> None:
        self._servers = servers
        self._clock = clock or StoreClock()
        self._base = base
        self._metrics = metrics
        # Waiting for one's turn is not the server being slow: only the operation itself is timed out.
        self._turns = asyncio.Semaphore(_MAX_OPERATIONS)
        self._failures = 0
        self._is_partial = False
        self._most = _CLUSTER_PAIRS if servers.by_tag else _GET_PAIRS
        self._together = Riders(self._get_together, size=len, most=self._most)

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`."""
        if 0 < len(digests) <= self._most:
            return await self._get_chunk(digests)
        entries: list[int] = []
        for chunk in _chunks(digests, self._most):
            entries += await self._get_chunk(chunk)
        return entries

    async def _get_chunk(self, digests: Sequence[bytes]) -> Sequence[int]:
        if len(digests) > self._most // 2:  # there is little room for others: it need not wait for them
            return await self._get_all(digests)
        return await self._together.ride(digests)

    async def _get_together(self, chunks: Sequence[Sequence[bytes]]) -> Sequence[Sequence[int]]:
        rest = iter(await self._get_all(list(itertools.chain.from_iterable(chunks))))
        return [list(itertools.islice(rest, len(chunk))) for chunk in chunks]

    async def _get_all(self, digests: Sequence[bytes]) -> Sequence[int]:
        async with self._operation("get"):
            if not self._servers.by_tag:
                sent_at = time.monotonic()
                [reply] = await self._run(GET, [(digests[0], [b"".join(digests)])])
                return await self._found(digests, reply, sent_at=sent_at)
            entries = [0] * len(digests)
            groups = self._groups(digests)
            sent_at = time.monotonic()
            replies = await self._run(
                GET, [(digests[p[0]], [b"".join([digests[i] for i in p])]) for p in groups]
            )
            unread, why = 0, ""
            for places, reply in zip(groups, replies, strict=True):
                if isinstance(reply, StoreError) and not isinstance(reply, SlotMoving):
                    # One node of several: what it has is not known, and the rest is.
                    unread, why = unread + len(places), str(reply)
                    continue
                found = await self._found([digests[place] for place in places], reply, sent_at=sent_at)
                for place, entry in zip(places, found, strict=True):
                    entries[place] = entry
            self._note_unread(unread, why, of=len(digests))
            return entries

    def _note_unread(self, count: int, why: str, *, of: int) -> None:
        """Count the pairs of nodes that did not reply. A change is logged, and not each look-up."""
        self._metrics.store_unread.inc(count)
        if count and not self._is_partial:
            self._is_partial = True
            _log.warning("a part of the Cluster does not reply; its pairs are taken as misses: %s", why)
        elif not count and self._is_partial and of >= _TELLING_PAIRS:
            self._is_partial = False
            _log.info("all of the Cluster replies again")

    async def _found(self, digests: Sequence[bytes], reply: Any, *, sent_at: float) -> Sequence[int]:
        """What a call's reply says of its digests. Its time is noted: by that clock they age."""
        if isinstance(reply, SlotMoving):
            return await self._get_one_by_one(digests)
        packed, garbage, server_seconds = reply
        self._clock.note(float(server_seconds), sent_at=sent_at, received_at=time.monotonic())
        if garbage:
            self._metrics.store_garbage.inc(garbage)
        return _unpacked(packed, count=len(digests))

    async def _get_one_by_one(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Pairs of a tag whose slot is moving: each key is here or there, so each is asked for by itself."""
        key = state_key(self._base, tag_of(digests[0]))
        [[generation, bucket_count]] = await self._servers.read([("HMGET", key, "generation", "buckets")])
        count = read_integer(bucket_count, minimum=COLUMNS, maximum=_MAX_BUCKETS)
        if generation is None or count is None:
            return [0] * len(digests)
        state = TagState(generation.decode("latin-1"), count)
        values = await self._servers.read(
            [("HGET", state.bucket(self._base, digest), digest[FIELD]) for digest in digests]
        )
        return [entry_of_value(value, today=self._clock.today()) or 0 for value in values]

    async def put(self, levels: Mapping[bytes, int], *, day: int | None = None) -> None:
        """See `Store.put`; as of another `day`, nothing newer is overwritten."""
        most = _CLUSTER_PAIRS if self._servers.by_tag else _PUT_PAIRS
        # In the order of their tags: a call that is about few of them has less to read and to write.
        for chunk in _chunks(sorted(levels.items()), most):
            packed = [digest + bytes((level,)) for digest, level in chunk]
            async with self._operation("put"):
                groups = self._groups(packed)
                as_of = "" if day is None else day
                replies = await self._run(
                    PUT, [(packed[p[0]], [b"".join([packed[i] for i in p]), as_of]) for p in groups]
                )
                failed = [reply for reply in replies if isinstance(reply, StoreError)]
                if failed:
                    message = f"of {len(replies)} calls {len(failed)} failed: {failed[0]}"
                    raise StoreRefused(message) from failed[0]
                self._metrics.store_garbage.inc(sum(replies))

    async def forget(self, digests: Sequence[bytes]) -> int:
        """See `Store.forget`."""
        removed = 0
        for chunk in _chunks(digests, _CLUSTER_PAIRS if self._servers.by_tag else _PUT_PAIRS):
            async with self._operation("forget"):
                groups = self._groups(chunk)
                replies = await self._run(
                    FORGET, [(chunk[p[0]], [b"".join([chunk[i] for i in p])]) for p in groups]
                )
                removed += sum(map(_required, replies))
        return removed

    async def clear(self) -> int:
        """Forget everything, each tag at once; how many pairs there were. `sweep` frees the memory."""
        async with self._operation("clear"):
            calls = [Call(state_key(self._base, tag), []) for tag in range(TAGS)]
            return sum(map(_required, await self._servers.run(CLEAR, calls)))

    async def sweep(self, tag: int, *, kept_days: int = 0, buckets: int) -> Swept:
        """Drop what is too old (0: nothing is), garbage, or left over in the next `buckets` of a tag.

        By Redis's clock: a replica whose own is wrong must not empty the cache.
        """
        async with self._operation("sweep"):
            call = Call(state_key(self._base, tag), [kept_days or "", buckets])
            removed, garbage, more = _required((await self._servers.run(SWEEP, [call]))[0])
            self._metrics.store_garbage.inc(garbage)
            return Swept(removed, bool(more))

    async def inspect(self, tag: int, *, samples: int, start: float) -> Inspected:
        """Look at a tag and some of its buckets; `start`, from 0 up to 1, says which."""
        async with self._operation("inspect"):
            call = Call(state_key(self._base, tag), [samples, start])
            reply = _required((await self._servers.run(INSPECT, [call]))[0])
        generation, buckets, pairs, leftovers, looked_at, garbage = reply
        triples = zip(looked_at[::3], looked_at[1::3], looked_at[2::3], strict=True)
        sampled = [(name.decode(), count, size) for name, count, size in triples]
        return Inspected(
            generation.decode("utf-8", "replace"), buckets, pairs, bool(leftovers), garbage, sampled
        )

    async def close(self) -> None:
        """See `Store.close`."""
        await self._servers.close()

    def _groups(self, items: Sequence[bytes]) -> list[Sequence[int]]:
        """The places of items (which begin with a digest) that one call may be about."""
        if not self._servers.by_tag:
            return [range(len(items))] if items else []
        groups: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(tag_of(item), []).append(place)
        return list(groups.values())

    async def _run(self, script: Script, calls: Sequence[tuple[bytes, list[Any]]]) -> list[Any]:
        """Run a script, each call about the tag of this digest; raises only if all fail."""
        replies = await self._servers.run(
            script, [Call(state_key(self._base, tag_of(digest)), args) for digest, args in calls]
        )
        failed = [reply for reply in replies if isinstance(reply, StoreError)]
        if failed and len(failed) == len(replies) and not isinstance(failed[0], SlotMoving):
            raise failed[0]
        return replies

    @asynccontextmanager
    async def _operation(self, name: str) -> AsyncIterator[None]:
        failures = self._failures
        async with self._turns:
            if self._failures != failures:
                raise StoreError("it failed whoever asked before")
            try:
                with self._metrics.store_duration.labels(name).time():
                    yield
            except StoreRefused:
                raise  # it answered
            except StoreError:
                self._failures += 1
                raise


def _required(reply: Any) -> Any:
    if isinstance(reply, StoreError):
        raise reply
    return reply


def _unpacked(reply: bytes, *, count: int) -> Sequence[int]:
    entries = array("H")
    if len(reply) != count * entries.itemsize:
        message = f"the store answered {len(reply)} bytes for {count} look-ups"
        raise StoreError(message)
    entries.frombytes(reply)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def _chunks(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
