"""The store on Redis or Valkey: pairs in hash buckets, one script call for a batch.

On a Cluster, a batch takes one call for each tag that its pairs belong to.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
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
from services.cache_proxy.cache.operation_limiter import OperationLimiter
from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.cache.store_replies import (
    SweepResult,
    TagInspection,
    parse_inspection,
    raise_if_error,
    unpack_entries,
)
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend, ScriptCall, SlotMovingError
from services.cache_proxy.redis_client.lua_script import Script
from services.cache_proxy.redis_client.values import read_integer
from services.cache_proxy.redis_keys import tag_state_key
from services.common.compat import override

_log = logging.getLogger(__name__)

# A script call with so many pairs occupies Redis for 2 to 3 ms.
_MAX_GET_PAIRS = 1000
_MAX_PUT_PAIRS = 334
# About 60 pairs for each of the 64 tags.
_MAX_CLUSTER_PAIRS = 4000
# A look-up of so many pairs reaches about every node of a Cluster.
_ALL_NODES_PAIRS = 4 * TAGS
# Of one tag; numbers in Lua are exact up to this one.
_MAX_BUCKETS = 2**53


class RedisStore(AnswerStore):
    """Look up and store whole batches; every script may be run twice, so one retry is safe.

    State: `_partially_unavailable`, whether one node of several did not reply to the last look-up. Used from
    the event loop only.
    """

    def __init__(
        self, backend: RedisBackend, *, base_key: str, metrics: ProxyMetrics, clock: StoreClock | None = None
    ) -> None:
        self._backend = backend
        self._clock = clock or StoreClock()
        self._base_key = base_key
        self._metrics = metrics
        self._operations = OperationLimiter(metrics)
        self._partially_unavailable = False
        self._max_get_pairs = _MAX_CLUSTER_PAIRS if backend.one_tag_per_call else _MAX_GET_PAIRS
        self._max_write_pairs = _MAX_CLUSTER_PAIRS if backend.one_tag_per_call else _MAX_PUT_PAIRS
        self._batcher = MicroBatcher(self._get_batch, size=len, max_size=self._max_get_pairs)

    @override
    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        if 0 < len(digests) <= self._max_get_pairs:
            return await self._get_chunk(digests)
        entries: list[int] = []
        for chunk in _chunks(digests, self._max_get_pairs):
            entries += await self._get_chunk(chunk)
        return entries

    async def _get_chunk(self, digests: Sequence[bytes]) -> Sequence[int]:
        # A large look-up leaves little space for others in its call, so it does not wait to share one.
        if len(digests) > self._max_get_pairs // 2:
            return await self._get_all(digests)
        return await self._batcher.submit(digests)

    async def _get_batch(self, chunks: Sequence[Sequence[bytes]]) -> Sequence[Sequence[int]]:
        entries = iter(await self._get_all(list(itertools.chain.from_iterable(chunks))))
        return [list(itertools.islice(entries, len(chunk))) for chunk in chunks]

    async def _get_all(self, digests: Sequence[bytes]) -> Sequence[int]:
        async with self._operations.run("get"):
            if not self._backend.one_tag_per_call:
                sent_at = time.monotonic()
                [reply] = await self._run_script(GET, [self._call(digests[0], b"".join(digests))])
                return await self._entries_from_reply(digests, reply, sent_at=sent_at)
            entries = [0] * len(digests)
            groups = self._group_by_tag(digests)
            sent_at = time.monotonic()
            replies = await self._run_for_groups(GET, digests, groups)
            unread = 0
            reason = ""
            for group, reply in zip(groups, replies, strict=True):
                if isinstance(reply, StoreError) and not isinstance(reply, SlotMovingError):
                    # One node of several failed: its pairs count as misses, the others are known.
                    unread += len(group)
                    reason = str(reply)
                    continue
                found = await self._entries_from_reply(
                    [digests[index] for index in group], reply, sent_at=sent_at
                )
                for index, entry in zip(group, found, strict=True):
                    entries[index] = entry
            self._record_unread(unread, reason, looked_up=len(digests))
            return entries

    def _record_unread(self, count: int, reason: str, *, looked_up: int) -> None:
        """Count the pairs of nodes that did not reply; log only the first failure and the recovery."""
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
        """Return the entries in a reply to a call; the reply's time synchronizes the clock of the store."""
        if isinstance(reply, SlotMovingError):
            return await self._get_individually(digests)
        packed, garbage, server_seconds = reply
        self._clock.synchronize(float(server_seconds), sent_at=sent_at, received_at=time.monotonic())
        if garbage:
            self._metrics.store_garbage.inc(garbage)
        return unpack_entries(packed, count=len(digests))

    async def _get_individually(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Look up pairs of one tag whose slot moves to another node.

        Each key is on the one node or on the other, so every pair is read by a command of one key.
        """
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

    @override
    async def put(self, levels_by_digest: Mapping[bytes, int], *, day: int | None = None) -> None:
        """Store levels as `AnswerStore.put` does; those of an earlier `day` overwrite nothing newer."""
        # Sorted by tag: a call that covers few tags has fewer states to read and to write.
        for chunk in _chunks(sorted(levels_by_digest.items()), self._max_write_pairs):
            packed = [digest + bytes((level,)) for digest, level in chunk]
            async with self._operations.run("put"):
                as_of = "" if day is None else day
                replies = await self._run_for_groups(PUT, packed, self._group_by_tag(packed), as_of)
                failed = [reply for reply in replies if isinstance(reply, StoreError)]
                if failed:
                    message = f"of {len(replies)} calls {len(failed)} failed: {failed[0]}"
                    raise StoreRejectedError(message) from failed[0]
                self._metrics.store_garbage.inc(sum(replies))

    @override
    async def delete(self, digests: Sequence[bytes]) -> int:
        removed = 0
        for chunk in _chunks(digests, self._max_write_pairs):
            async with self._operations.run("forget"):
                replies = await self._run_for_groups(DELETE, chunk, self._group_by_tag(chunk))
                removed += sum(map(raise_if_error, replies))
        return removed

    async def clear(self) -> int:
        """Delete everything, atomically for each tag, and return the number of pairs.

        The memory is freed later, by `sweep`.
        """
        async with self._operations.run("clear"):
            calls = [ScriptCall(tag_state_key(self._base_key, tag), []) for tag in range(TAGS)]
            return sum(map(raise_if_error, await self._backend.run_script(CLEAR, calls)))

    async def sweep(self, tag: int, *, retention_days: int = 0, buckets: int) -> SweepResult:
        """Delete expired pairs, garbage and leftovers from the next `buckets` of a tag.

        `retention_days` 0 means that pairs do not expire. Ages are measured by Redis's clock, so that a
        replica with a wrong clock cannot empty the cache.
        """
        async with self._operations.run("sweep"):
            call = ScriptCall(tag_state_key(self._base_key, tag), [retention_days or "", buckets])
            removed, garbage, more = raise_if_error((await self._backend.run_script(SWEEP, [call]))[0])
            self._metrics.store_garbage.inc(garbage)
            return SweepResult(removed, bool(more))

    async def inspect(self, tag: int, *, samples: int, start: float) -> TagInspection:
        """Inspect a tag and `samples` of its buckets, beginning at the fraction `start` (0 to 1) of them."""
        async with self._operations.run("inspect"):
            call = ScriptCall(tag_state_key(self._base_key, tag), [samples, start])
            reply = raise_if_error((await self._backend.run_script(INSPECT, [call]))[0])
        return parse_inspection(reply)

    @override
    async def close(self) -> None:
        await self._backend.close()

    def _group_by_tag(self, items: Sequence[bytes]) -> list[Sequence[int]]:
        """Return groups of indices of items that one call may cover; items begin with a digest."""
        if not self._backend.one_tag_per_call:
            return [range(len(items))] if items else []
        groups: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(tag_for_digest(item), []).append(index)
        return list(groups.values())

    def _call(self, digest: bytes, *args: Any) -> ScriptCall:
        """Return a call that runs on the server that has the tag of a digest."""
        return ScriptCall(tag_state_key(self._base_key, tag_for_digest(digest)), args)

    async def _run_for_groups(
        self, script: Script, items: Sequence[bytes], groups: Sequence[Sequence[int]], *args: Any
    ) -> list[Any]:
        """Run a script once for each group of items, with the joined items and `args` as arguments."""
        calls = [
            self._call(items[group[0]], b"".join([items[index] for index in group]), *args)
            for group in groups
        ]
        return await self._run_script(script, calls)

    async def _run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        """Return a reply or a `StoreError` for each call. Raises `StoreError` only if every call failed."""
        replies = await self._backend.run_script(script, calls)
        failed = [reply for reply in replies if isinstance(reply, StoreError)]
        if failed and len(failed) == len(replies) and not isinstance(failed[0], SlotMovingError):
            raise failed[0]
        return replies


def _chunks(items: Sequence[Any], max_items: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), max_items):
        yield items[start : start + max_items]
