"""Tasks that are ended for good."""

import asyncio
from collections.abc import Iterable
from typing import Any

_RETRY_SECONDS = 0.1


async def cancel_and_wait(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel tasks and return when they have ended, however they did.

    Once is not enough: in Python 3.11 `asyncio.wait_for` forgets a cancellation that comes just as what it
    waits for is done (gh-86296), and redis-py sends every command through it. Measured: one in ten
    cancellations during a command.
    """
    ending = set(tasks)
    left = ending
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_RETRY_SECONDS)
    await asyncio.gather(*ending, return_exceptions=True)  # so that no failure counts as never looked at
