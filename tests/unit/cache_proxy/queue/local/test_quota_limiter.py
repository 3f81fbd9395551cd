"""The quota limiter, compared with the promise and with a GCRA as a model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.queue.local.gcra import Gcra
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.quotas import Quota

SLOT_SECONDS = 2.0
# One and a half slots.
BURST_SECONDS = 3.0


def _quota_limiter(replicas: int = 1) -> QuotaLimiter:
    return QuotaLimiter(slot_seconds=SLOT_SECONDS, replicas=lambda: replicas, now=0.0)


@given(
    st.sampled_from([0.1, 3.0, 50.0, 1000.0]),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 200), st.booleans()), min_size=1, max_size=30),
)
def test_quota_limiter_behaves_as_gcra_with_refunds(
    pairs_per_second: float, steps: list[tuple[float, int, bool]]
) -> None:
    """Through any pauses, sends and refunds it allows what a GCRA of its rate and burst does.

    So at most `rate * T + burst` is sent in any T seconds.
    """
    limiter = _quota_limiter()
    quota = Quota("a", pairs_per_second)
    burst = max(1.0, pairs_per_second * 0.98 * BURST_SECONDS)
    model = Gcra.fully_spent(rate_per_second=pairs_per_second, burst=burst, now=0.0)
    now = 0.0
    sent: list[tuple[float, int]] = []
    for pause, wanted, is_refunded in steps:
        now += pause
        allowed = int(limiter.available(quota, now=now))
        assert allowed == math.floor(
            burst - model.wait_seconds(burst, now=now) * model.rate_per_second + 1e-5
        )
        assert limiter.wait_seconds(quota, allowed + 1, now=now) == pytest.approx(
            max(0.0, max(model.tat, now) + (allowed + 1 - burst) / model.rate_per_second - now), abs=1e-6
        )
        count = min(wanted, allowed)
        consumption = limiter.consume({quota: count}, now=now)
        if is_refunded:
            limiter.refund(consumption)
        elif count:
            model.consume(count, now=now)
            sent.append((now, count))
    for first, (begins, _) in enumerate(sent):
        total = 0
        for at, count in sent[first:]:
            total += count
            assert total <= pairs_per_second * (at - begins) + burst + 1e-6


def test_each_replica_gets_equal_part_of_quota() -> None:
    """Both of the rate and of the queued pairs, but at least one queued pair."""
    quota = Quota("a", pairs_per_second=100, queued_pairs=10)
    assert _quota_limiter(4).available(quota, now=1000.0) == math.floor(100 * 0.98 / 4 * BURST_SECONDS)
    assert _quota_limiter(4).max_queued_pairs(quota) == 2
    assert _quota_limiter(40).max_queued_pairs(quota) == 1
    assert _quota_limiter(4).max_queued_pairs(Quota("a", pairs_per_second=1)) == 0


def test_quota_starts_fully_used_after_reset() -> None:
    """After a start, or after another queue was used, the quota recovers with time only."""
    limiter = _quota_limiter()
    quota = Quota("a", pairs_per_second=100)
    assert limiter.available(quota, now=0.0) == 0
    assert limiter.available(quota, now=10.0) == 294
    limiter.reset(now=10.0)
    assert limiter.available(quota, now=10.0) == 0
    assert limiter.available(quota, now=11.0) == 98


def test_unused_quotas_take_no_memory() -> None:
    """Only accounts whose quota is partly used are kept."""
    limiter = _quota_limiter()
    for number in range(1000):
        limiter.consume({Quota(f"a{number}", 10.0): 1}, now=float(number))
    assert len(limiter._tat) <= 2
