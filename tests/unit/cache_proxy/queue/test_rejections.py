"""Tests of the errors for requests that are not queued."""

import math

from services.cache_proxy.queue import rejections


def test_unknown_wait_is_described_without_infinity() -> None:
    """The message has no `inf s`, and the pushback is finite."""
    for left_seconds in (2.0, math.inf):
        refusal = rejections.deadline_error(wait_seconds=math.inf, left_seconds=left_seconds)
        assert "inf s for the model" not in refusal.message
        assert 1 <= refusal.retry_after_seconds <= 60
    assert (
        "no call to the model is due, and the deadline is in 2.0 s"
        in rejections.deadline_error(wait_seconds=math.inf, left_seconds=2.0).message
    )
