"""This build reads what the last release left in Redis, and writes what the last release reads."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import InvalidModelResponseError, ModelUnavailableError, PairRejectedError
from services.cache_proxy.queue.interface import Claim
from services.cache_proxy.redis_keys import FORMAT, QueueKeys
from services.cache_proxy.status.rolling_window import decode_report
from tests.support.processes import ROOT
from tests.support.queue_recording import PREFIX, WAITING, Recording, load, record
from tests.support.redis_server import RedisServer, redis_process
from tests.support.replicas import QueueLocation, Replica, replicas

NAMESPACE = "fold1:1"
ADDED = {f"{{{PREFIX}}}:limit field format number"}
"""What this build writes and the last release does not know: it reads every field by its name."""

pytestmark = pytest.mark.skipif(FORMAT != 1, reason="the last release has queue format 1")


@pytest.fixture(scope="module")
def recording() -> Recording:
    """What the last release left."""
    return Recording.read()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for the recorded prefix."""
    with redis_process(tmp_path) as started:
        yield started


def _place(server: RedisServer) -> QueueLocation:
    return QueueLocation(server.url, QueueKeys(prefix=PREFIX, namespace=NAMESPACE))


def _records(recording: Recording, name: str) -> dict[bytes, Any]:
    packed = recording.snapshots[name][f"{{{PREFIX}}}:q1:{NAMESPACE}:pairs"]
    return {
        digest.encode("latin-1"): msgpack.unpackb(record.encode("latin-1"))
        for digest, record in packed.items()
    }


def _garbage(replica: Replica) -> float:
    return float(replica.metrics.store_garbage._value.get())


@pytest.mark.parametrize("name", [WAITING, "suspects"])
async def test_recorded_pairs_are_claimed_once_with_their_texts(
    server: RedisServer, recording: Recording, name: str
) -> None:
    """Take over what two replicas of the last release left: pairs in lanes, in claims, and suspects."""
    place, expected = _place(server), _records(recording, name)
    with place.client() as client:
        load(recording.snapshots[name], client)
        client.hset(place.keys.limit, mapping={"calls_per_second": 50, "pairs_per_second": 0})
    wanted = [Pair(digest, record["company"], record["title"]) for digest, record in expected.items()]
    claimed: list[Pair] = []
    async with replicas(place) as (one,), asyncio.timeout(30):
        _, enqueued = await one.enqueue(wanted)
        while len(claimed) < len(expected):
            await one.heartbeat()
            decision = await one.queue.claim()
            if isinstance(decision, Claim):
                claimed += decision.pairs
                await one.queue.complete(decision, dict.fromkeys((pair.digest for pair in decision.pairs), 3))
            await asyncio.sleep(0.02)
        garbage = _garbage(one)
    assert (dict(enqueued.outcomes), enqueued.queued) == ({}, frozenset())
    assert sorted(claimed, key=lambda pair: pair.digest) == sorted(wanted, key=lambda pair: pair.digest)
    assert garbage == 0
    assert place.leftover_keys().keys() <= {"log"}


async def test_recorded_outcomes_are_known(server: RedisServer, recording: Recording) -> None:
    """Answer from what the last release remembers: levels, rejected pairs, and pairs that broke the model."""
    place = _place(server)
    kept = recording.snapshots["end"]
    with place.client() as client:
        load(kept, client)
        client.delete(f"{place.keys.base}pairs")
    remembered = {
        kind: [
            digest.encode("latin-1")
            for key, values in kept.items()
            if f":{kind}:" in key
            for digest in values
        ]
        for kind in ("recent", "refused", "broke")
    }
    errors = {"refused": PairRejectedError, "broke": ModelUnavailableError}
    async with replicas(place) as (one,):
        for kind, digests in remembered.items():
            assert digests, kind
            _, enqueued = await one.enqueue([Pair(digest, "c", "t") for digest in digests])
            assert set(enqueued.outcomes) == set(digests)
            assert all(isinstance(outcome, errors.get(kind, int)) for outcome in enqueued.outcomes.values())
        assert _garbage(one) == 0


async def test_recorded_messages_are_read(server: RedisServer, recording: Recording) -> None:
    """Take levels and errors from every message, and miss none."""
    messages = [message.encode("latin-1") for message in recording.messages]
    async with replicas(_place(server)) as (one,):
        one.session.subscription.queue_id = msgpack.unpackb(messages[0], raw=True)[4]
        one.session.subscription.sequence = 0
        one.session.subscription.missed.clear()
        for message in messages:
            one.session.subscription.apply_message(message)
        assert _garbage(one) == 0
        assert not one.session.subscription.missed.is_set()
    outcomes = [outcome for _, outcome in one.resolved]
    for kind in (int, PairRejectedError, InvalidModelResponseError, ModelUnavailableError):
        assert any(isinstance(outcome, kind) for outcome in outcomes)


def test_recorded_reports_are_read(recording: Recording) -> None:
    """Show what replicas of the last release counted."""
    reports = [
        report.encode("latin-1")
        for key, values in recording.values.items() if ":reports:" in key
        for value in values for report in value.values()
    ]  # fmt: skip
    assert reports
    assert None not in [decode_report(report) for report in reports]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_this_build_writes_the_shapes_of_the_last_release(tmp_path: Path, recording: Recording) -> None:
    """Write the same keys, fields and types in the same situations. If this fails, see CONTRIBUTING.md."""
    written = record(ROOT, tmp_path).shapes()
    assert written - recording.shapes() == ADDED
    assert recording.shapes() - written == set()
