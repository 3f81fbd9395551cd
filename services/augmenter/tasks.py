"""Tasks that end with whoever began them."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def together(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """`asyncio.gather`, but when one fails, or the caller is cancelled, the others are ended first.

    The failure is raised itself, not in an exception group: it is what the user will read.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_ahead(items: AsyncGenerator[_T]) -> AsyncGenerator[_T]:
    """The same items; while one is in use, the next is already being made."""
    task = asyncio.create_task(_next(items))
    try:
        while made := await task:
            task = asyncio.create_task(_next(items))
            yield made[0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next(items: AsyncGenerator[_T]) -> tuple[_T] | None:
    async for item in items:
        return (item,)
    return None
