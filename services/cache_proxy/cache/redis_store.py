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

from services.cache_proxy.batching import MicroBatcher
from services.cache_proxy.cache.buckets import (
    COLUMNS,
    FIELD_BYTES,
    TAGS,
    TagState,
    entry_from_value,
    tag_for_digest,
)
from services.cache_proxy.cache.cache_scripts import CLEAR, DELETE, GET, INSPECT, PUT, SWEEP
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend, ScriptCall, SlotMovingError
from services.cache_proxy.redis_client.lua_script import Script
from services.cache_proxy.redis_client.values import read_integer
from services.cache_proxy.redis_keys import tag_state_key

_log = logging.getLogger(__name__)

# A script call of these sizes holds Redis for 2 to 3 ms.
_MAX_GET_PAIRS = 1000
_MAX_PUT_PAIRS = 334
_MAX_CLUSTER_PAIRS = 4000  # which is 60 a tag
_MAX_OPERATIONS = 16
_ALL_NODES_PAIRS = 4 * TAGS  # a look-up of so many is about every node
_MAX_BUCKETS = 2**53  # of a tag, as Lua's numbers are exact


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a step of the sweep found: pairs removed, and whether earlier generations have left something."""

    removed: int
    has_leftovers: bool


@dataclass(frozen=True, slots=True)
class TagInspection:
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
        self, backend: RedisBackend, *, base_key: str, metrics: ProxyMetrics, clock: StoreClock | None = None
    ) -> None:
        self._backend = backend
        self._clock = clock or StoreClock()
        self._base_key = base_key
        self._metrics = metrics
        # Waiting for one's turn is not the server being slow: only the operation itself is timed out.
        self._operation_slots = asyncio.Semaphore(_MAX_OPERATIONS)
        self._failure_count = 0
        self._partially_unavailable = False
        self._max_call_pairs = _MAX_CLUSTER_PAIRS if backend.one_tag_per_call else _MAX_GET_PAIRS
        self._batcher = MicroBatcher(self._get_batch, size=len, max_size=self._max_call_pairs)

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`."""
        if 0 < len(digests) <= self._max_call_pairs:
            return await self._get_chunk(digests)
        entries: list[int] = []
        for chunk in _chunks(digests, self._max_call_pairs):
            entries += await self._get_chunk(chunk)
        return entries

    async def _get_chunk(self, digests: Sequence[bytes]) -> Sequence[int]:
        if (
            len(digests) > self._max_call_pairs // 2
        ):  # there is little room for others: it need not wait for them
            return await self._get_all(digests)
        return await self._batcher.submit(digests)

    async def _get_batch(self, chunks: Sequence[Sequence[bytes]]) -> Sequence[Sequence[int]]:
        rest = iter(await self._get_all(list(itertools.chain.from_iterable(chunks))))
        return [list(itertools.islice(rest, len(chunk))) for chunk in chunks]

    async def _get_all(self, digests: Sequence[bytes]) -> Sequence[int]:
        async with self._operation("get"):
            if not self._backend.one_tag_per_call:
                sent_at = time.monotonic()
                [reply] = await self._run_script(GET, [(digests[0], [b"".join(digests)])])
                return await self._entries_from_reply(digests, reply, sent_at=sent_at)
            entries = [0] * len(digests)
            groups = self._group_by_tag(digests)
            sent_at = time.monotonic()
            replies = await self._run_script(
                GET, [(digests[p[0]], [b"".join([digests[i] for i in p])]) for p in groups]
            )
            unread, why = 0, ""
            for places, reply in zip(groups, replies, strict=True):
                if isinstance(reply, StoreError) and not isinstance(reply, SlotMovingError):
                    # One node of several: what it has is not known, and the rest is.
                    unread, why = unread + len(places), str(reply)
                    continue
                found = await self._entries_from_reply(
                    [digests[place] for place in places], reply, sent_at=sent_at
                )
                for place, entry in zip(places, found, strict=True):
                    entries[place] = entry
            self._record_unread(unread, why, looked_up=len(digests))
            return entries

    def _record_unread(self, count: int, reason: str, *, looked_up: int) -> None:
        """Count the pairs of nodes that did not reply. A change is logged, and not each look-up."""
        self._metrics.store_unread_pairs.inc(count)
        if count and not self._partially_unavailable:
            self._partially_unavailable = True
            _log.warning("a part of the Cluster does not reply; its pairs are taken as misses: %s", reason)
        elif not count and self._partially_unavailable and looked_up >= _ALL_NODES_PAIRS:
            self._partially_unavailable = False
            _log.info("all of the Cluster replies again")

    async def _entries_from_reply(
        self, digests: Sequence[bytes], reply: Any, *, sent_at: float
    ) -> Sequence[int]:
        """What a call's reply says of its digests. Its time is noted: by that clock they age."""
        if isinstance(reply, SlotMovingError):
            return await self._get_individually(digests)
        packed, garbage, server_seconds = reply
        self._clock.synchronize(float(server_seconds), sent_at=sent_at, received_at=time.monotonic())
        if garbage:
            self._metrics.store_garbage.inc(garbage)
        return _unpack_entries(packed, count=len(digests))

    async def _get_individually(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Pairs of a tag whose slot is moving: each key is here or there, so each is asked for by itself."""
        key = tag_state_key(self._base_key, tag_for_digest(digests[0]))
        [[generation, bucket_count]] = await self._backend.read_many(
            [("HMGET", key, "generation", "buckets")]
        )
        count = read_integer(bucket_count, minimum=COLUMNS, maximum=_MAX_BUCKETS)
        if generation is None or count is None:
            return [0] * len(digests)
        state = TagState(generation.decode("latin-1"), count)
        values = await self._backend.read_many(
            [("HGET", state.bucket_key(self._base_key, digest), digest[FIELD_BYTES]) for digest in digests]
        )
        return [entry_from_value(value, today=self._clock.today()) or 0 for value in values]

    async def put(self, levels_by_digest: Mapping[bytes, int], *, day: int | None = None) -> None:
        """See `Store.put`; as of another `day`, nothing newer is overwritten."""
        most = _MAX_CLUSTER_PAIRS if self._backend.one_tag_per_call else _MAX_PUT_PAIRS
        # In the order of their tags: a call that is about few of them has less to read and to write.
        for chunk in _chunks(sorted(levels_by_digest.items()), most):
            packed = [digest + bytes((level,)) for digest, level in chunk]
            async with self._operation("put"):
                groups = self._group_by_tag(packed)
                as_of = "" if day is None else day
                replies = await self._run_script(
                    PUT, [(packed[p[0]], [b"".join([packed[i] for i in p]), as_of]) for p in groups]
                )
                failed = [reply for reply in replies if isinstance(reply, StoreError)]
                if failed:
                    message = f"of {len(replies)} calls {len(failed)} failed: {failed[0]}"
                    raise StoreRejectedError(message) from failed[0]
                self._metrics.store_garbage.inc(sum(replies))

    async def delete(self, digests: Sequence[bytes]) -> int:
        """See `Store.forget`."""
        removed = 0
        for chunk in _chunks(
            digests, _MAX_CLUSTER_PAIRS if self._backend.one_tag_per_call else _MAX_PUT_PAIRS
        ):
            async with self._operation("forget"):
                groups = self._group_by_tag(chunk)
                replies = await self._run_script(
                    DELETE, [(chunk[p[0]], [b"".join([chunk[i] for i in p])]) for p in groups]
                )
                removed += sum(map(_raise_if_error, replies))
        return removed

    async def clear(self) -> int:
        """Forget everything, each tag at once; how many pairs there were. `sweep` frees the memory."""
        async with self._operation("clear"):
            calls = [ScriptCall(tag_state_key(self._base_key, tag), []) for tag in range(TAGS)]
            return sum(map(_raise_if_error, await self._backend.run_script(CLEAR, calls)))

    async def sweep(self, tag: int, *, retention_days: int = 0, buckets: int) -> SweepResult:
        """Drop what is too old (0: nothing is), garbage, or left over in the next `buckets` of a tag.

        By Redis's clock: a replica whose own is wrong must not empty the cache.
        """
        async with self._operation("sweep"):
            call = ScriptCall(tag_state_key(self._base_key, tag), [retention_days or "", buckets])
            removed, garbage, more = _raise_if_error((await self._backend.run_script(SWEEP, [call]))[0])
            self._metrics.store_garbage.inc(garbage)
            return SweepResult(removed, bool(more))

    async def inspect(self, tag: int, *, samples: int, start: float) -> TagInspection:
        """Look at a tag and some of its buckets; `start`, from 0 up to 1, says which."""
        async with self._operation("inspect"):
            call = ScriptCall(tag_state_key(self._base_key, tag), [samples, start])
            reply = _raise_if_error((await self._backend.run_script(INSPECT, [call]))[0])
        generation, buckets, pairs, leftovers, looked_at, garbage = reply
        triples = zip(looked_at[::3], looked_at[1::3], looked_at[2::3], strict=True)
        sampled = [(name.decode(), count, size) for name, count, size in triples]
        return TagInspection(
            generation.decode("utf-8", "replace"), buckets, pairs, bool(leftovers), garbage, sampled
        )

    async def close(self) -> None:
        """See `Store.close`."""
        await self._backend.close()

    def _group_by_tag(self, items: Sequence[bytes]) -> list[Sequence[int]]:
        """The places of items (which begin with a digest) that one call may be about."""
        if not self._backend.one_tag_per_call:
            return [range(len(items))] if items else []
        groups: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(tag_for_digest(item), []).append(place)
        return list(groups.values())

    async def _run_script(self, script: Script, calls: Sequence[tuple[bytes, list[Any]]]) -> list[Any]:
        """Run a script, each call about the tag of this digest; raises only if all fail."""
        replies = await self._backend.run_script(
            script,
            [
                ScriptCall(tag_state_key(self._base_key, tag_for_digest(digest)), args)
                for digest, args in calls
            ],
        )
        failed = [reply for reply in replies if isinstance(reply, StoreError)]
        if failed and len(failed) == len(replies) and not isinstance(failed[0], SlotMovingError):
            raise failed[0]
        return replies

    @asynccontextmanager
    async def _operation(self, name: str) -> AsyncIterator[None]:
        failures = self._failure_count
        async with self._operation_slots:
            if self._failure_count != failures:
                raise StoreError("it failed whoever asked before")
            try:
                with self._metrics.store_duration.labels(name).time():
                    yield
            except StoreRejectedError:
                raise  # it answered
            except StoreError:
                self._failure_count += 1
                raise


def _raise_if_error(reply: Any) -> Any:
    if isinstance(reply, StoreError):
        raise reply
    return reply


def _unpack_entries(reply: bytes, *, count: int) -> Sequence[int]:
    entries = array("H")
    if len(reply) != count * entries.itemsize:
        message = f"the store answered {len(reply)} bytes for {count} look-ups"
        raise StoreError(message)
    entries.frombytes(reply)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def _chunks(items: Sequence[Any], max_items: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), max_items):
        yield items[start : start + max_items]
