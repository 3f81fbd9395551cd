"""Long work in short breaths: a call to the model must leave on time, whatever a caller sent meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


async def in_breaths(
    items: Sequence[_Item], most: int, *, size: Callable[[_Item], int] | None = None, most_size: int = 0
) -> AsyncIterator[Sequence[_Item]]:
    """So many at a time, of `most_size` in all at most, but at least one; others have turns between."""
    start = 0
    while start < len(items):
        if start:
            await asyncio.sleep(0)
        some = items[start : start + most]
        while size is not None and len(some) > 1 and sum(map(size, some)) > most_size:
            some = some[: len(some) // 2]
        yield some
        start += len(some)
