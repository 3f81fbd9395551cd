"""The rate limits never allow more than promised, and nearly all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.queue.local.call_limiter import RateLimiter
from services.cache_proxy.queue.local.gcra import Gcra

RATE = 1000.0
BURST = 1000


def _worst_excess(consumed: list[tuple[float, int]], *, rate: float) -> float:
    """Return by how much the cost in any window [a, b] exceeds `rate * (b - a)`."""
    worst = 0.0
    for first in range(len(consumed)):
        total = 0
        for at, cost in consumed[first:]:
            total += cost
            worst = max(worst, total - rate * (at - consumed[first][0]))
    return worst


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, BURST)), min_size=1, max_size=30))
def test_cost_in_any_window_is_within_rate_and_burst(steps: list[tuple[float, int]]) -> None:
    """Whatever the pauses and costs, at most `rate * T + burst` is consumed in any T seconds."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    now = 0.0
    consumed = []
    for pause, cost in steps:
        now += pause
        now += limit.wait_seconds(cost, now=now)
        assert limit.wait_seconds(cost, now=now) <= 1e-9
        limit.consume(cost, now=now)
        consumed.append((now, cost))
    assert _worst_excess(consumed, rate=RATE) <= BURST + 1e-6


@given(st.lists(st.integers(1, BURST), min_size=50, max_size=80))
def test_backlog_uses_at_least_97_percent_of_rate(costs: list[int]) -> None:
    """A caller that consumes as soon as it may gets at least 97 % of the rate."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    now = 0.0
    for cost in costs:
        now += limit.wait_seconds(cost, now=now)
        limit.consume(cost, now=now)
    assert sum(costs) >= 0.97 * RATE * now - BURST


def test_new_limit_starts_fully_spent() -> None:
    """A restart, even in a loop, gives no free batch: the first one comes an interval later."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=5.0)
    assert limit.wait_seconds(BURST, now=5.0) == pytest.approx(1 / 0.98)


@given(st.integers(1, BURST))
def test_refund_restores_limit(cost: int) -> None:
    """A consumed and refunded cost has no effect."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    before = limit.tat
    limit.consume(cost, now=0.0)
    limit.refund(cost)
    assert limit.tat == pytest.approx(before)


def test_refund_after_idle_time_frees_at_most_the_burst() -> None:
    """Idle time before the claim is not saved up by refunding the claim."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    limit.consume(BURST, now=100.0)
    limit.refund(BURST)
    assert limit.wait_seconds(BURST, now=100.0) == 0
    limit.consume(BURST, now=100.0)
    assert limit.wait_seconds(BURST, now=100.0) == pytest.approx(1 / 0.98)


@pytest.mark.parametrize(("rate", "calls"), [(1000.0, 1.0), (1e6, 2.0), (50.0, 100.0), (1000.0, 0.0)])
def test_rate_limiter_keeps_pair_and_call_limits(rate: float, calls: float) -> None:
    """With a backlog of full batches neither limit is exceeded, and the stricter one is used up."""
    limiter = RateLimiter(pairs_per_second=rate, calls_per_second=calls, burst=BURST, now=0.0)
    now = 0.0
    consumed = []
    for _ in range(60):
        now += limiter.wait_seconds(BURST, now=now)
        limiter.consume(BURST, now=now)
        consumed.append((now, BURST))
    assert _worst_excess(consumed, rate=rate) <= BURST + 1e-6
    slot_seconds = max(BURST / rate, 1 / calls if calls else 0.0)
    if calls:
        assert _worst_excess([(at, 1) for at, _ in consumed], rate=calls) <= 1 + 1e-6
    assert now <= 60 * slot_seconds / 0.97


def test_block_until_can_be_shortened() -> None:
    """When the model answers again, calls do not wait for the end of a backoff."""
    limiter = RateLimiter(pairs_per_second=1e6, calls_per_second=0, burst=1, now=0.0)
    limiter.block_until(5.0)
    limiter.block_until(2.0)
    assert limiter.wait_seconds(1, now=1.0) == pytest.approx(1.0)


def test_rate_of_zero_means_no_limit() -> None:
    """No call waits, however much was consumed."""
    limit = Gcra.fully_spent(rate_per_second=0.0, burst=BURST, now=0.0)
    for _ in range(3):
        assert limit.wait_seconds(BURST, now=0.0) == 0
        limit.consume(BURST, now=0.0)
    assert limit.tat == 0.0


@pytest.mark.parametrize(
    ("rate", "calls", "seconds"),
    [
        (1000.0, 1.0, 1 / 0.98),
        (500.0, 1.0, 2 / 0.98),
        (1e6, 4.0, 0.25 / 0.98),
        (0.0, 2.0, 0.5 / 0.98),
        (1000.0, 0.0, 1 / 0.98),
        (0.0, 0.0, 0.0),
    ],
)
def test_slot_seconds_follow_stricter_limit(rate: float, calls: float, seconds: float) -> None:
    """Without a limit they are 0. Full batches wait exactly that long."""
    limiter = RateLimiter(pairs_per_second=rate, calls_per_second=calls, burst=1000, now=0.0)
    assert limiter.slot_seconds == pytest.approx(seconds)
    limiter.consume(1000, now=100.0)
    assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(seconds)


def test_postpone_moves_next_slot_and_second_call_replaces_first() -> None:
    """A later call moves the next slot by as much, once or repeatedly, and a refund undoes it."""
    limiter = RateLimiter(pairs_per_second=1000, calls_per_second=1, burst=1000, now=0.0)
    limiter.consume(1000, now=100.0)
    slot = limiter.wait_seconds(1000, now=100.0)
    for seconds in (0.5, 0.2, 0.2):
        assert limiter.postpone(seconds)
        assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(slot + seconds)
    limiter.refund(1000)
    assert limiter.wait_seconds(1000, now=100.0) == 0
    limiter.consume(1000, now=100.0)
    assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(slot)
