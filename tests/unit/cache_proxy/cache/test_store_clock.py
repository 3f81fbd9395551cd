"""The clock by which answers age, without a server."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from services.cache_proxy.cache.entry import DAY_ZERO_SECONDS, FreshnessPolicy, day_at, pack_entry
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.domain import DAY_SECONDS


class _Clocks:
    """This process's two clocks, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = DAY_ZERO_SECONDS + 100.5 * DAY_SECONDS
        self.monotonic = 1000.0
        both = SimpleNamespace(time=lambda: self.wall, monotonic=lambda: self.monotonic)
        monkeypatch.setattr("services.cache_proxy.cache.store_clock.time", both)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> _Clocks:
    """Noon of day 100."""
    return _Clocks(monkeypatch)


def test_clock_without_a_server_is_this_processs(clocks: _Clocks) -> None:
    """No reply yet, or no server at all: the day is the process's own, and the difference is none."""
    clock = StoreClock()
    assert (clock.now(), clock.today(), clock.difference_seconds()) == (clocks.wall, 100, 0)
    clocks.wall += DAY_SECONDS
    assert clock.today() == 101


def test_clock_follows_the_servers_time_halfway_between_request_and_reply(clocks: _Clocks) -> None:
    """Sent at 990, received at 1000: the server's time was that of 995."""
    clock = StoreClock()
    server = clocks.wall - 40 * DAY_SECONDS
    clock.synchronize(server, sent_at=990.0, received_at=1000.0)
    assert clock.now() == server + 5
    assert clock.today() == 60
    assert clock.difference_seconds() == 40 * DAY_SECONDS - 5


def test_clock_goes_on_without_replies_whatever_this_processs_wall_clock_does(clocks: _Clocks) -> None:
    """Redis is lost for a day: the next day comes; a wall clock that jumps changes only the difference."""
    clock = StoreClock()
    clock.synchronize(clocks.wall, sent_at=1000.0, received_at=1000.0)
    clocks.monotonic += DAY_SECONDS
    clocks.wall += 8 * DAY_SECONDS
    assert clock.today() == 101
    assert clock.difference_seconds() == 7 * DAY_SECONDS
    clock.synchronize(clocks.wall, sent_at=clocks.monotonic, received_at=clocks.monotonic)
    assert (clock.today(), clock.difference_seconds()) == (108, 0)


def test_days_count_from_the_start_of_2026_in_utc() -> None:
    """What is stored says so: another first day or length of a day would change the age of every answer."""
    start = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    assert [day_at(start + seconds) for seconds in (0, 86_399, 86_400, 365 * 86_400)] == [0, 0, 1, 365]


def test_answer_without_a_lifetime_expires_after_every_day_that_can_be_stored() -> None:
    """A day has 13 bits."""
    assert FreshnessPolicy().expiry_day(pack_entry(7, 2**13 - 1)) > 2**13
