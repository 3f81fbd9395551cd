"""Tests of a shared queue whose keys were changed by another client: it goes on, and no answer is made up.

More than 250 lines: all of them share the strategies that corrupt keys.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache_proxy.errors import PairError, StoreError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred, RequestContext
from services.cache_proxy.queue.quotas import Quota, Quotas
from tests.support.redis_server import redis_process
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

# They start and stop real servers, and run many examples.
pytestmark = pytest.mark.slow

KEYS = [
    "pairs",
    "claims",
    "claimed",
    "suspects",
    "meta",
    "reserved",
    "lane:interactive",
    "lane:bulk",
    "lane:refresh",
    "fair:interactive",
    "LIMIT",
    "LIMIT:replicas",
    "LIMIT:addresses",
    "LIMIT:paused",
    "recent",
    "refused",
    "quotas",
    "lane:interactive:c",
    "fair:accounts:interactive",
    "LIMIT:spent",
    "MODEL",
]

# Pairs of `c` wait in lanes of its account, those of `d` in the shared ones.
QUOTAS = Quotas({"c": Quota("c", 1e6, 10**6)})


def _names(place: QueueLocation, key: str) -> list[str]:
    """Return the keys behind a name; keys of remembered outcomes change with time."""
    if key == "MODEL":
        return [place.keys.model]
    if key.startswith("LIMIT"):
        return [place.keys.limit + key.removeprefix("LIMIT")]
    if key in {"recent", "refused"}:
        with place.client() as client:
            period = {"recent": 60, "refused": 600}[key]
            now = client.time()[0] // period
            return [f"{place.keys.base}{key}:{number}" for number in (now - 1, now, now + 1)]
    return [place.keys.base + key]


def _change_type(client: "redis.Redis", name: str) -> None:
    kind = client.type(name)
    client.delete(name)
    if kind == b"string":
        client.rpush(name, "x")
    else:
        client.set(name, b"\xc1 what is this")


def _context_for(replica: Replica) -> RequestContext:
    """Return a request context whose caller has a quota at the first replica only."""
    return request_context("c" if int(replica.name, 16) == 1 else "d")


async def _run_requests(replica: Replica, numbers: range) -> None:
    """Enqueue, release, complete and cancel until all pairs are answered with 1 + number % 7."""
    for attempt in range(60):
        try:
            await replica.heartbeat()
            wait, _ = await replica.enqueue(numbered_pairs(numbers), _context_for(replica))
            # The session does this every now and then.
            await replica.queue.re_enqueue()
            claim = await replica.queue.claim()
            if isinstance(claim, Claim):
                levels = {
                    item.digest: 1 + number % 7
                    for number, item in zip(pair_numbers(claim), claim.pairs, strict=True)
                }
                if attempt == 0:
                    await replica.queue.release(claim)
                else:
                    await replica.queue.complete(claim, levels)
            await replica.cancel(wait)
            if not wait.pending:
                assert all(
                    isinstance(outcome, PairError) or outcome == 1 + int.from_bytes(digest, "big") % 7
                    for digest, outcome in wait.outcomes.items()
                ), wait.outcomes
                return
        except StoreError:
            # As if Redis were lost for a moment.
            continue
        if isinstance(claim, ClaimDeferred):
            replica.location.age_claims(3000)
            await asyncio.sleep(min(0.02, claim.wait_seconds))
    raise AssertionError("stuck")


@pytest.mark.parametrize("key", KEYS)
async def test_key_of_another_type_does_not_stop_queue(key: str, shared_redis: str) -> None:
    """The key is replaced while pairs wait and are in a call. They and new ones are answered by the model."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, quotas=lambda: QUOTAS) as (one, other):
        await one.enqueue(numbered_pairs(range(8)))
        await other.enqueue(numbered_pairs(range(12)), _context_for(other))
        await one.claim_batch()
        with place.client() as client:
            for name in _names(place, key):
                _change_type(client, name)
        await _run_requests(one, range(12))
        await _run_requests(other, range(6, 20))


MSGPACK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.binary(max_size=9), inner, max_size=5),
    max_leaves=10,
).map(lambda value: bytes(msgpack.packb(value, use_bin_type=False)))

_JUNK: list[Any] = [
    b"bulk",
    b"bulk:c",
    b"x:",
    {b"bulk:c": [1, b"c"]},
    b"x",
    b"\xff",
    0,
    -1,
    1.5,
    float("nan"),
    2**60,
    None,
    True,
    [],
    {},
]

RECORD: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from(_JUNK)
        for name in (
            "lane",
            "tag",
            "caller",
            "at",
            "attempts",
            "deaths",
            "refusals",
            "company",
            "title",
            "size",
            "claim",
            "suspect",
            "interest",
            "replica",
            "send_at",
            "slot_at",
            "lease_until",
            "also",
            "paid",
        )
    },
)

VALUES = st.one_of(
    st.binary(max_size=30),
    MSGPACK,
    st.sampled_from([b"", b"0", b"3", b"9", b"17", b"1e999", b"nan"]),
    RECORD.map(lambda value: bytes(msgpack.packb(value, use_bin_type=False))),
)

_FIELDS = [
    b"x",
    b"y" * 16,
    b"queue",
    b"calls_tat",
    b"not_before",
    b"failures",
    b"failed_at",
    b"backoff_until",
    b"probe",
    b"down",
    b"failing_since",
    b"failing_at",
    b"reason",
    b"answered_at",
    b"answered_by",
]


def _is_level(junk: bytes) -> bool:
    """Return whether Lua reads it as a level: a forged level cannot be distinguished from a real one."""
    text = junk.decode("latin-1").strip().lower()
    try:
        return (float.fromhex(text) if "0x" in text else float(text)) in range(1, 8)
    except ValueError:
        return False


def _merged(packed: bytes | str | None, junk: bytes) -> bytes:
    """Return a record with some fields replaced, if both values are records."""
    try:
        record, change = msgpack.unpackb(packed or b"", raw=True), msgpack.unpackb(junk, raw=True)
        return bytes(msgpack.packb({**record, **change}, use_bin_type=False))
    except (ValueError, TypeError):
        return junk


def _corrupt(client: "redis.Redis", name: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """Put another value of the right type into a key."""
    kind = client.type(name)
    if kind == b"hash":
        for field, value in list(client.hgetall(name).items()):
            if draw(st.booleans()):
                junk = _merged(value, draw(VALUES))
                client.hset(name, field, b"x" if ":recent:" in name and _is_level(junk) else junk)
        if draw(st.booleans()):
            client.hset(
                name,
                draw(st.sampled_from(_FIELDS)),
                draw(VALUES),
            )
    elif kind == b"zset":
        client.zadd(
            name, {draw(st.sampled_from([b"x", b"z" * 16, b""])): draw(st.sampled_from([-1e300, 0, 1e300]))}
        )
    elif kind == b"list":
        client.lpush(name, draw(VALUES))


@settings(max_examples=25)
@given(data=st.data())
def test_hostile_values_do_not_stop_queue_or_become_answers(data: st.DataObject, shared_redis: str) -> None:
    """Any field of any key may change. In the end every request is answered by the model or fails."""

    async def run() -> None:
        place = QueueLocation.create(shared_redis)
        async with replicas(place, 2, quotas=lambda: QUOTAS) as (one, other):
            await one.enqueue(numbered_pairs(range(12)))
            await other.enqueue(numbered_pairs(range(6, 16)), _context_for(other))
            claim = await one.claim_batch()
            await one.queue.complete(claim, {claim.pairs[0].digest: 1 + pair_numbers(claim)[0] % 7})
            with place.client() as client:
                for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)):
                    for name in _names(place, key):
                        _corrupt(client, name, data.draw)
                # A limit that another client sets is valid, so it must not be a random one.
                for setting in (
                    "pairs_per_second",
                    "calls_per_second",
                ):
                    client.hset(place.keys.limit, setting, 0)
            await _run_requests(one, range(12))
            await _run_requests(other, range(20))

    asyncio.run(run())


async def test_invalid_messages_are_ignored(shared_redis: str) -> None:
    """Levels out of range, truncated messages and other types resolve no pair, and the answer arrives."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        wait, _ = await replica.enqueue(numbered_pairs([1]))
        digest = numbered_pairs([1])[0].digest
        chance = random.Random(1)
        queue_id = replica.session.subscription.queue_id
        messages = [
            msgpack.packb([5, digest + bytes([level]), [], False, queue_id], use_bin_type=False)
            for level in (0, 8, 255)
        ]
        messages += [
            msgpack.packb([*value, queue_id], use_bin_type=False)
            for value in ([], [1, 2, 3, 4], ["x", b"", [], 0], [1, b"", 5, 0], [1, {}, [[]], 0])
        ]
        messages += [msgpack.packb(value) for value in (None, [], 7, [1, 2, 3, 4], [1, 2, 3, 4, 5])]
        messages += [chance.randbytes(size) for size in range(40)]
        with place.client() as client:
            for message in messages:
                client.publish(replica.scripts.channel, message)
        await replica.receive_messages()
        assert wait.pending
        assert not replica.resolved
        await replica.recover()
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {digest: 4})
        assert list(wait.outcomes.values()) == [4]


async def test_pair_with_unreadable_text_is_not_sent(shared_redis: str) -> None:
    """The rest of its batch is sent."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs([1, 2]))
        with place.client() as client:
            digest = numbered_pairs([1])[0].digest
            record = client.hget(f"{place.keys.base}pairs", digest)
            client.hset(
                f"{place.keys.base}pairs", digest, _merged(record, msgpack.packb({"company": b"\xff\xfe"}))
            )
        assert pair_numbers(await replica.claim_batch()) == [2]


async def test_flushed_scripts_are_loaded_again(shared_redis: str) -> None:
    """A restart or SCRIPT FLUSH between load and call does not count as lost Redis."""
    async with replicas(QueueLocation.create(shared_redis)) as (replica,):
        replica.client.script_flushes = 3
        await replica.enqueue(numbered_pairs([1]))
        assert pair_numbers(await replica.claim_batch()) == [1]


async def test_queue_works_while_redis_is_out_of_memory(tmp_path: Path) -> None:
    """The queue is bounded and may write what the cache may not. Pairs that end free memory."""
    with redis_process(tmp_path) as server:
        place = QueueLocation.create(server.url)
        async with replicas(place, 1, queue_limits(batch_pairs=50)) as (replica,):
            with place.client() as client:
                client.config_set("maxmemory", 1)
                with pytest.raises(redis.exceptions.OutOfMemoryError):
                    client.set("x", "y")
            wait, _ = await replica.enqueue(numbered_pairs(range(100)))
            await replica.heartbeat()
            claim = await replica.claim_batch()
            await replica.queue.release(claim)
            for _ in range(2):
                claim = await replica.claim_batch()
                await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
            assert not wait.pending
            assert place.leftover_keys() == {}


@pytest.mark.parametrize(
    "key",
    [
        "pairs",
        "claims",
        "claimed",
        "suspects",
        "meta",
        "lane:interactive",
        "LIMIT",
        "quotas",
        "lane:interactive:c",
    ],
)
async def test_deleted_key_is_repaired_by_next_re_enqueue(key: str, shared_redis: str) -> None:
    """Deleted or evicted: the waiting pairs are enqueued again, and answered."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, quotas=lambda: QUOTAS) as (replica,):
        wait, _ = await replica.enqueue(
            numbered_pairs(range(8)), request_context("c" if key.endswith((":c", "quotas")) else "d")
        )
        await replica.claim_batch()
        with place.client() as client:
            client.delete(*_names(place, key))
        await replica.heartbeat()
        place.age_claims(60_000)
        await replica.heartbeat()
        await replica.queue.re_enqueue()
        for _ in range(10):
            if not wait.pending:
                break
            claim = await replica.claim_batch()
            await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        assert not wait.pending


async def test_tombstones_of_another_type_are_ignored(shared_redis: str) -> None:
    """The answer is remembered, and the other pairs keep their positions."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.enqueue(numbered_pairs(range(3)))
        claim = await one.claim_batch()
        await one.enqueue(numbered_pairs(range(3, 5)))
        with place.client() as client:
            client.set(f"{place.keys.base}tombs", "garbage")
            await one.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
            assert client.hlen(f"{place.keys.base}pairs") == 2
        _, enqueued = await one.enqueue(numbered_pairs([1]))
        assert enqueued.outcomes == {numbered_pairs([1])[0].digest: 3}
