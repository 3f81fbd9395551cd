"""Tests of a shared queue whose keys were changed by another client: it goes on, and no answer is made up."""

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

from services.cache_proxy.errors import PairError, StoreAccessDeniedError, StoreDamagedError, StoreError
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


async def test_queue_is_reset_once_for_failure_that_reset_does_not_repair(
    shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that still fails resets the queue again only after it has succeeded once."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        command, failing, repairs = replica.scripts._node.command, True, 0
        claim_sha = replica.scripts._scripts["claim"].sha
        reset_sha = replica.scripts._scripts["reset"].sha

        async def fail(*words: Any) -> Any:
            nonlocal repairs
            repairs += words[1] == reset_sha
            if failing and words[1] == claim_sha:
                message = "WRONGTYPE Operation against a key holding the wrong kind of value"
                raise StoreError(message) from redis.ResponseError(message)
            return await command(*words)

        monkeypatch.setattr(replica.scripts._node, "command", fail)
        await replica.enqueue(numbered_pairs(range(3)))
        for _ in range(5):
            with pytest.raises(StoreDamagedError):
                await replica.queue.claim()
            await replica.heartbeat()
        assert repairs == 1
        failing = False
        await replica.queue.re_enqueue()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]
        failing = True
        with pytest.raises(StoreDamagedError):
            await replica.queue.claim()
        assert repairs == 2


async def test_damage_found_by_concurrent_scripts_is_reset_once(shared_redis: str) -> None:
    """None of them fails: they wait for the one that resets the queue, so the replica does not fail over."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs(range(3)))
        for turn in range(3):
            with place.client() as client:
                client.set(f"{place.keys.base}meta", b"garbage")
            await asyncio.gather(*(replica.session._heartbeat() for _ in range(4)))
            assert replica.metrics.store_garbage._value.get() == turn + 1
        await replica.queue.re_enqueue()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]


async def test_queue_is_reset_for_one_script_while_another_keeps_failing(
    shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that finds damage repairs it although claims keep failing."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        command = replica.scripts._node.command
        claim_sha = replica.scripts._scripts["claim"].sha

        async def fail(*words: Any) -> Any:
            if words[1] == claim_sha:
                message = "WRONGTYPE Operation against a key holding the wrong kind of value"
                raise StoreError(message) from redis.ResponseError(message)
            return await command(*words)

        monkeypatch.setattr(replica.scripts._node, "command", fail)
        await replica.enqueue(numbered_pairs(range(3)))
        with pytest.raises(StoreDamagedError):
            await replica.queue.claim()
        await replica.heartbeat()
        with place.client() as client:
            client.set(f"{place.keys.base}meta", b"garbage")
        await replica.heartbeat()


@pytest.mark.parametrize(
    "words",
    [
        "NOPERM User app has no permissions to run the 'publish' command",
        "ERR ACL failure in script: User app has no permissions to run the 'publish' command",
        "ERR Unknown Redis command called from script script: 1, on @user_script:400.",
        "ERR unknown command 'EVALSHA', with args beginning with:",
        "OOM command not allowed when used memory > 'maxmemory'. script: 1, on @user_script:9.",
        "BUSY Redis is busy running a script.",
        "MISCONF Redis is configured to save RDB snapshots script: 1, on @user_script:9.",
        "NOREPLICAS Not enough good replicas to write. script: 1, on @user_script:9.",
        "ERR an error of no known kind script: 1, on @user_script:9.",
    ],
)
async def test_server_state_never_resets_queue(
    words: str, shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only errors that data causes do: one replica must not delete the queue of all."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs(range(3)))
        sent = []

        async def refuse(*command: Any) -> Any:
            sent.append(command[1])
            raise StoreError(words) from redis.ResponseError(words)

        monkeypatch.setattr(replica.scripts._node, "command", refuse)
        with pytest.raises(StoreError) as raised:
            await replica.queue.claim()
        assert replica.scripts._scripts["reset"].sha not in sent
        refused = any(name in words for name in ("NOPERM", "ACL", "nknown"))
        assert isinstance(raised.value, StoreAccessDeniedError) is refused
        monkeypatch.undo()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]


JUNK_NUMBERS = [b"", b"garbage", b"\xff\x00", b"nan", b"inf", b"-inf", b"-1", b"9" * 400, b"1e308", b"1e12"]


@pytest.mark.parametrize("junk", JUNK_NUMBERS)
async def test_unreadable_limit_is_replaced_by_settings(
    junk: bytes, shared_redis: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next heartbeat replaces, counts and logs it once. A replica without Redis keeps the limit."""
    place, bounds = QueueLocation.create(shared_redis), queue_limits(calls_per_second=2, pairs_per_second=8)
    async with replicas(place, 1, bounds) as (replica,):
        with place.client() as client:
            names = [
                "pairs_per_second",
                "calls_per_second",
                "batch_pairs",
                "pairs_tat",
                "calls_tat",
                "not_before",
            ]
            client.hset(place.keys.limit, mapping=dict.fromkeys(names, junk))
            before = replica.metrics.store_garbage._value.get()
            caplog.clear()
            for _ in range(3):
                await replica.heartbeat()
            stored = client.hmget(place.keys.limit, names[:3])
        assert [float(value or "nan") for value in stored] == [8 * 0.98, 2 * 0.98, 4]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "calls_per_second" in caplog.records[0].message
        assert replica.metrics.store_garbage._value.get() > before
        assert replica.failover._limiter.slot_seconds > 0.5
        await replica.enqueue(numbered_pairs([1]))
        # The whole limit may just have been used.
        assert isinstance(await replica.queue.claim(), ClaimDeferred)


@pytest.mark.parametrize("junk", JUNK_NUMBERS)
async def test_unreadable_limit_leaves_slots_of_silent_replica_free(junk: bytes, shared_redis: str) -> None:
    """Until a heartbeat has replaced it, claims use the replica's own settings."""
    place, bounds = QueueLocation.create(shared_redis), queue_limits(calls_per_second=1e-6)
    async with replicas(place, 2, bounds) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        # The first claim records the server.
        await one.queue.claim()
        other.expire_heartbeat()
        with place.client() as client:
            client.hset(place.keys.limit, "calls_per_second", junk)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
        assert isinstance(await one.queue.claim(), ClaimDeferred)


@pytest.mark.parametrize(
    ("name", "score"),
    [(b"\xff,\x00", 0.0), (b"x,y,z", None), (b"ab" * 500, None), (b"abcd", 1e300), (b"abcd", float("inf"))],
)
async def test_invalid_replica_entry_has_no_share(
    name: bytes, score: float | None, shared_redis: str
) -> None:
    """It has no share of the limit and no slots, if its name or its heartbeat's time is not possible."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=2)) as (replica,):
        with place.client() as client:
            now_ms = client.time()[0] * 1000
            client.zadd(f"{place.keys.limit}:replicas", {name: now_ms if score is None else score})
            client.hset(f"{place.keys.limit}:paused", name, b"1e15")
            await replica.heartbeat()
            assert client.zrange(f"{place.keys.limit}:replicas", 0, -1) == [replica.name.encode()]
            assert client.hlen(f"{place.keys.limit}:paused") == 0
        assert replica.failover._limiter.replicas == 1


async def test_peer_state_with_distant_expiry_is_ignored(shared_redis: str) -> None:
    """The replica may have lost Redis and use its own slots, so they are left free."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, queue_limits(calls_per_second=1e-6)) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        # The first claim records the server.
        await one.queue.claim()
        with place.client() as client:
            client.hset(f"{place.keys.limit}:paused", other.name, 2**52)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
        other.expire_heartbeat()
        assert isinstance(await one.queue.claim(), ClaimDeferred)
