"""Who waits for which pair, and who is told of its end."""

import asyncio

from services.cache_proxy.errors import Unavailable
from services.cache_proxy.queue.waiters import Waiters

DOWN = Unavailable("down", 1.0)


async def test_only_waits_whose_deadline_is_before_the_next_try_are_given_up() -> None:
    """The pair goes on for those with more time; the queue hears of it when the last one leaves."""
    now, waiters = asyncio.get_running_loop().time(), Waiters()
    short = waiters.open([b"1", b"2"], deadline=now + 5)
    long = waiters.open([b"1"], deadline=now + 50)
    waiters.settle(b"2", 4)
    waiters.give_up_before(now + 20, DOWN)
    await short.done()
    assert short.outcomes == {b"1": DOWN, b"2": 4}
    assert long.open == {b"1"}
    assert waiters.close(short) == []
    waiters.settle(b"1", 7)
    assert long.outcomes == {b"1": 7}
    assert waiters.close(long) == []


async def test_who_is_given_up_last_leaves_the_pair_to_the_queue() -> None:
    """Nobody waits for it any more, so it need not be sent."""
    waiters = Waiters()
    one, other = (waiters.open([b"1"], deadline=0.0) for _ in range(2))
    waiters.give_up_before(1.0, DOWN)
    assert waiters.close(one) == [b"1"]
    assert waiters.close(other) == [b"1"]
    assert not waiters._by_digest
    assert not waiters._waits


async def test_who_waits_without_a_deadline_is_not_given_up() -> None:
    """A refresh has all the time."""
    waiters = Waiters()
    wait = waiters.open([b"1"])
    waiters.give_up_before(1e12, DOWN)
    assert wait.open == {b"1"}
