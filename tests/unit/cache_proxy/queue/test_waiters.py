"""Tests of the requests that wait for pairs, and of the pairs for which none waits any more."""

import asyncio

from services.cache_proxy.errors import ModelUnavailableError
from services.cache_proxy.queue.waiters import WaiterRegistry

DOWN = ModelUnavailableError("down", 1.0)


async def test_only_waiters_with_earlier_deadline_are_failed() -> None:
    """The pair goes on for requests with more time, and is cancelled when the last one ends."""
    now, waiters = asyncio.get_running_loop().time(), WaiterRegistry()
    short = waiters.register([b"1", b"2"], deadline=now + 5)
    long = waiters.register([b"1"], deadline=now + 50)
    waiters.resolve(b"2", 4)
    waiters.fail_with_deadline_before(now + 20, DOWN)
    await short.wait()
    assert short.outcomes == {b"1": DOWN, b"2": 4}
    assert long.pending == {b"1"}
    assert waiters.unregister(short) == []
    waiters.resolve(b"1", 7)
    assert long.outcomes == {b"1": 7}
    assert waiters.unregister(long) == []


async def test_failed_waiters_return_pair_for_cancellation() -> None:
    """No request waits for it any more, so it need not be sent."""
    waiters = WaiterRegistry()
    one, other = (waiters.register([b"1"], deadline=0.0) for _ in range(2))
    waiters.fail_with_deadline_before(1.0, DOWN)
    assert waiters.unregister(one) == [b"1"]
    assert waiters.unregister(other) == [b"1"]
    assert not waiters._by_digest
    assert not waiters._waiters


async def test_waiter_without_deadline_is_not_failed() -> None:
    """A refresh has no deadline."""
    waiters = WaiterRegistry()
    wait = waiters.register([b"1"])
    waiters.fail_with_deadline_before(1e12, DOWN)
    assert wait.pending == {b"1"}
