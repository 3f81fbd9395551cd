"""The reasons that callers get for pairs that are not queued."""

import math

from services.cache_proxy.queue import rejections


def test_a_wait_without_an_end_is_told_in_words() -> None:
    """A replica whose turn is not known says so, not `inf s`, and the pushback is a number."""
    for left_seconds in (2.0, math.inf):
        refusal = rejections.deadline_error(wait_seconds=math.inf, left_seconds=left_seconds)
        assert "inf s for the model" not in refusal.message
        assert 1 <= refusal.retry_after_seconds <= 60
    assert (
        "no call to the model is due, and the deadline is in 2.0 s"
        in rejections.deadline_error(wait_seconds=math.inf, left_seconds=2.0).message
    )
