"""The clock that decides the age of answers, tested without a server."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from services.cache_proxy.cache.entry import DAY_ZERO_SECONDS, FreshnessPolicy, day_at, pack_entry
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.domain import DAY_SECONDS


class _Clocks:
    """The two clocks of this process, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = DAY_ZERO_SECONDS + 100.5 * DAY_SECONDS
        self.monotonic = 1000.0
        module = SimpleNamespace(time=lambda: self.wall, monotonic=lambda: self.monotonic)
        monkeypatch.setattr("services.cache_proxy.cache.store_clock.time", module)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> _Clocks:
    """Return clocks at noon of day 100."""
    return _Clocks(monkeypatch)


def test_clock_without_server_is_that_of_the_process(clocks: _Clocks) -> None:
    """Before the first reply, or without a server, the process's clock counts and the difference is 0."""
    clock = StoreClock()
    assert (clock.now(), clock.today(), clock.difference_seconds()) == (clocks.wall, 100, 0)
    clocks.wall += DAY_SECONDS
    assert clock.today() == 101


def test_clock_takes_server_time_halfway_between_request_and_reply(clocks: _Clocks) -> None:
    """Sent at 990 and received at 1000: the server's time belongs to 995."""
    clock = StoreClock()
    server_seconds = clocks.wall - 40 * DAY_SECONDS
    clock.synchronize(server_seconds, sent_at=990.0, received_at=1000.0)
    assert clock.now() == server_seconds + 5
    assert clock.today() == 60
    assert clock.difference_seconds() == 40 * DAY_SECONDS - 5


def test_clock_continues_without_replies_when_wall_clock_jumps(clocks: _Clocks) -> None:
    """Without Redis for a day, the day advances; a jump of the wall clock changes only the difference."""
    clock = StoreClock()
    clock.synchronize(clocks.wall, sent_at=1000.0, received_at=1000.0)
    clocks.monotonic += DAY_SECONDS
    clocks.wall += 8 * DAY_SECONDS
    assert clock.today() == 101
    assert clock.difference_seconds() == 7 * DAY_SECONDS
    clock.synchronize(clocks.wall, sent_at=clocks.monotonic, received_at=clocks.monotonic)
    assert (clock.today(), clock.difference_seconds()) == (108, 0)


def test_days_are_counted_from_the_start_of_2026_in_utc() -> None:
    """Stored entries depend on it: another first day or day length would change every answer's age."""
    start = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    assert [day_at(start + seconds) for seconds in (0, 86_399, 86_400, 365 * 86_400)] == [0, 0, 1, 365]


def test_no_expiry_is_later_than_every_day_that_can_be_stored() -> None:
    """A day has 13 bits in an entry."""
    assert FreshnessPolicy().expiry_day(pack_entry(7, 2**13 - 1)) > 2**13
