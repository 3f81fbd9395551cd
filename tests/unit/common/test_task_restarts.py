"""Work that must not end."""

import asyncio
import logging

import pytest

from services.common.supervision import restart_on_failure
from services.common.tasks import cancel_and_wait


async def test_what_fails_unforeseen_is_told_and_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    """The second beginning goes on as if nothing had been; the log has the failure once."""
    begun, goes_on = 0, asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise TypeError("not foreseen")
        goes_on.set()
        await asyncio.Event().wait()

    with caplog.at_level(logging.ERROR):
        task = asyncio.create_task(restart_on_failure(work, name="the work", delay_seconds=0))
        await asyncio.wait_for(goes_on.wait(), 30)
    assert [record.message for record in caplog.records] == ["the work failed unexpectedly; it begins anew"]
    await cancel_and_wait([task])
    assert begun == 2
    assert task.cancelled()
