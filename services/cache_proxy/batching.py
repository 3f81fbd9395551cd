"""Batch concurrent calls: items that arrive while a batch is processed go together in the next one.

There is no timer: an item that arrives alone is processed at once, and the higher the load the larger the
batches.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class MicroBatcher(Generic[_Item, _Result]):
    """Passes submitted items to `process_batch`, one batch at a time.

    `process_batch` returns a result for each item by position. If it raises, every item that is waiting then
    gets the error.

    State (event loop only):

    - `_pending`: items that are not in a batch yet, each with its caller's future.
    - `_task`: the one task that processes batches.

    A caller that is cancelled takes its item out of `_pending`. Other callers are not affected.
    """

    def __init__(
        self,
        process_batch: Callable[[Sequence[_Item]], Awaitable[Sequence[_Result]]],
        *,
        size: Callable[[_Item], int],
        max_size: int,
    ) -> None:
        self._process_batch = process_batch
        self._size = size
        self._max_size = max_size
        self._pending: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: _Item) -> _Result:
        """Return the item's result. Raises what `process_batch` raised for the item's batch."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if self._task is None:
            # An empty context: the task serves many callers, so it must not run in the trace of one of them.
            self._task = asyncio.create_task(self._run(), context=Context())
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._next_batch():
                try:
                    results = await self._process_batch([item for item, _ in batch])
                    paired = list(zip(batch, results, strict=True))
                except Exception as error:  # noqa: BLE001 - every error is passed to the callers
                    # Items that arrived meanwhile would wait for the same failure.
                    while self._pending:
                        batch.append(self._pending.popleft())
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, future), result in paired:
                        if not future.done():
                            future.set_result(result)
        finally:
            self._task = None

    def _next_batch(self) -> list[tuple[_Item, "asyncio.Future[_Result]"]]:
        """Remove the next batch from the pending items: at least one item, if any is pending."""
        batch: list[tuple[_Item, asyncio.Future[_Result]]] = []
        remaining_size = self._max_size
        while self._pending:
            item, future = self._pending[0]
            if not future.done():
                if batch and self._size(item) > remaining_size:
                    break
                batch.append((item, future))
                remaining_size -= self._size(item)
            self._pending.popleft()
        return batch
