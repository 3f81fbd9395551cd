"""Long work in short breaths: a call to the model must leave on time, whatever a caller sent meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


async def in_breaths(items: Sequence[_Item], most: int) -> AsyncIterator[Sequence[_Item]]:
    """So many at a time; others have their turn in between."""
    for start in range(0, len(items), most):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + most]
