"""The limits on calls to the model, against the promise itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.queue.local.call_limiter import RateLimiter
from services.cache_proxy.queue.local.gcra import Gcra

RATE, BURST = 1000.0, 1000


def _worst_excess(spent: list[tuple[float, int]], *, rate: float) -> float:
    """How far any window [a, b] of the log exceeds `rate * (b - a)`, in cost."""
    worst = 0.0
    for first in range(len(spent)):
        total = 0
        for at, cost in spent[first:]:
            total += cost
            worst = max(worst, total - rate * (at - spent[first][0]))
    return worst


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, BURST)), min_size=1, max_size=30))
def test_no_window_holds_more_than_rate_and_burst(steps: list[tuple[float, int]]) -> None:
    """However long the pauses and however large the costs: at most `rate * T + burst` in any T."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    now, spent = 0.0, []
    for pause, cost in steps:
        now += pause
        now += limit.wait_seconds(cost, now=now)
        assert limit.wait_seconds(cost, now=now) <= 1e-9
        limit.consume(cost, now=now)
        spent.append((now, cost))
    assert _worst_excess(spent, rate=RATE) <= BURST + 1e-6


@given(st.lists(st.integers(1, BURST), min_size=50, max_size=80))
def test_a_backlog_uses_the_rate(costs: list[int]) -> None:
    """Whoever takes every turn as it comes gets at least 97 % of the rate."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    now = 0.0
    for cost in costs:
        now += limit.wait_seconds(cost, now=now)
        limit.consume(cost, now=now)
    assert sum(costs) >= 0.97 * RATE * now - BURST


def test_a_fresh_limit_assumes_that_all_was_just_spent() -> None:
    """A start, or a restart in a loop, is never a free batch: the first comes one interval later."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=5.0)
    assert limit.wait_seconds(BURST, now=5.0) == pytest.approx(1 / 0.98)


@given(st.integers(1, BURST))
def test_a_refund_leaves_the_limit_as_it_was(cost: int) -> None:
    """A slot taken and given back has cost nothing."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    before = limit.tat
    limit.consume(cost, now=0.0)
    limit.refund(cost)
    assert limit.tat == pytest.approx(before)


def test_a_refund_after_idle_time_frees_no_more_than_the_burst() -> None:
    """What lay idle before the claim is not saved up by giving the claim back."""
    limit = Gcra.fully_spent(rate_per_second=RATE, burst=BURST, now=0.0)
    limit.consume(BURST, now=100.0)
    limit.refund(BURST)
    assert limit.wait_seconds(BURST, now=100.0) == 0
    limit.consume(BURST, now=100.0)
    assert limit.wait_seconds(BURST, now=100.0) == pytest.approx(1 / 0.98)


@pytest.mark.parametrize(("rate", "calls"), [(1000.0, 1.0), (1e6, 2.0), (50.0, 100.0), (1000.0, 0.0)])
def test_both_limits_hold_together(rate: float, calls: float) -> None:
    """Full batches, one behind the other: neither limit is passed, and the lesser one is used."""
    limiter = RateLimiter(pairs_per_second=rate, calls_per_second=calls, burst=BURST, now=0.0)
    now, spent = 0.0, []
    for _ in range(60):
        now += limiter.wait_seconds(BURST, now=now)
        limiter.consume(BURST, now=now)
        spent.append((now, BURST))
    assert _worst_excess(spent, rate=rate) <= BURST + 1e-6
    slot_seconds = max(BURST / rate, 1 / calls if calls else 0.0)
    if calls:
        assert _worst_excess([(at, 1) for at, _ in spent], rate=calls) <= 1 + 1e-6
    assert now <= 60 * slot_seconds / 0.97


def test_a_hold_can_be_shortened() -> None:
    """The last word counts: when the model answers again, nobody waits for the end of a backoff."""
    limiter = RateLimiter(pairs_per_second=1e6, calls_per_second=0, burst=1, now=0.0)
    limiter.block_until(5.0)
    limiter.block_until(2.0)
    assert limiter.wait_seconds(1, now=1.0) == pytest.approx(1.0)


def test_a_rate_of_0_never_waits() -> None:
    """0 means no limit, however much was spent."""
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
def test_full_batches_are_a_slot_apart(rate: float, calls: float, seconds: float) -> None:
    """The stricter limit decides; without one there is nothing to wait for. What is waited for is that."""
    limiter = RateLimiter(pairs_per_second=rate, calls_per_second=calls, burst=1000, now=0.0)
    assert limiter.slot_seconds == pytest.approx(seconds)
    limiter.consume(1000, now=100.0)
    assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(seconds)


def test_delay_moves_the_next_slot_and_its_last_word_counts() -> None:
    """A call that leaves late moves what follows by as much, told twice or not; a refund takes it back."""
    limiter = RateLimiter(pairs_per_second=1000, calls_per_second=1, burst=1000, now=0.0)
    limiter.consume(1000, now=100.0)
    slot = limiter.wait_seconds(1000, now=100.0)
    for late, moved in ((0.5, 0.5), (0.2, 0.2), (0.2, 0.2)):
        assert limiter.postpone(late)
        assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(slot + moved)
    limiter.refund(1000)
    assert limiter.wait_seconds(1000, now=100.0) == 0
    limiter.consume(1000, now=100.0)
    assert limiter.wait_seconds(1000, now=100.0) == pytest.approx(slot)
