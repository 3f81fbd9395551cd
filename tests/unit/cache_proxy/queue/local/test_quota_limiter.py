"""What accounts may send, against the promise itself and against a limit that is simple to believe."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.queue.local.gcra import Gcra
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.quotas import Quota

SLOT_SECONDS = 2.0
BURST_SECONDS = 3.0  # one and a half slots


def _accounts(replicas: int = 1) -> QuotaLimiter:
    return QuotaLimiter(slot_seconds=SLOT_SECONDS, replicas=lambda: replicas, now=0.0)


@given(
    st.sampled_from([0.1, 3.0, 50.0, 1000.0]),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 200), st.booleans()), min_size=1, max_size=30),
)
def test_it_is_a_gcra_whose_claims_may_be_undone(
    pairs_per_second: float, steps: list[tuple[float, int, bool]]
) -> None:
    """Through any pauses, sends and undone sends it allows what a GCRA of its rate and burst does, and so no
    more than the rate times T and the burst in any window of T seconds.
    """  # noqa: D205 - one thought
    accounts, quota = _accounts(), Quota("a", pairs_per_second)
    burst = max(1.0, pairs_per_second * 0.98 * BURST_SECONDS)
    model = Gcra.fully_spent(rate_per_second=pairs_per_second, burst=burst, now=0.0)
    now, sent = 0.0, list[tuple[float, int]]()
    for pause, wanted, undone in steps:
        now += pause
        allowed = int(accounts.available(quota, now=now))
        assert allowed == math.floor(
            burst - model.wait_seconds(burst, now=now) * model.rate_per_second + 1e-5
        )
        assert accounts.wait_seconds(quota, allowed + 1, now=now) == pytest.approx(
            max(0.0, max(model.tat, now) + (allowed + 1 - burst) / model.rate_per_second - now), abs=1e-6
        )
        count = min(wanted, allowed)
        spent = accounts.consume({quota: count}, now=now)
        if undone:
            accounts.refund(spent)
        elif count:
            model.consume(count, now=now)
            sent.append((now, count))
    for first, (begins, _) in enumerate(sent):
        total = 0
        for at, count in sent[first:]:
            total += count
            assert total <= pairs_per_second * (at - begins) + burst + 1e-6


def test_each_replica_has_its_part() -> None:
    """Of the rate and of the places in the queue; never none."""
    quota = Quota("a", pairs_per_second=100, queued_pairs=10)
    assert _accounts(4).available(quota, now=1000.0) == math.floor(100 * 0.98 / 4 * BURST_SECONDS)
    assert _accounts(4).max_queued_pairs(quota) == 2
    assert _accounts(40).max_queued_pairs(quota) == 1
    assert _accounts(4).max_queued_pairs(Quota("a", pairs_per_second=1)) == 0


def test_what_may_have_been_spent_elsewhere_was() -> None:
    """After a start, or after another queue was in use, nothing is saved up; time gives it back."""
    accounts, quota = _accounts(), Quota("a", pairs_per_second=100)
    assert accounts.available(quota, now=0.0) == 0
    assert accounts.available(quota, now=10.0) == 294
    accounts.reset(now=10.0)
    assert accounts.available(quota, now=10.0) == 0
    assert accounts.available(quota, now=11.0) == 98


def test_what_is_whole_again_is_not_kept() -> None:
    """Memory is of those only whose quota is not whole."""
    accounts = _accounts()
    for number in range(1000):
        accounts.consume({Quota(f"a{number}", 10.0): 1}, now=float(number))
    assert len(accounts._tat) <= 2
