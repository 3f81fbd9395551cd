"""Calls that come while one is under way go together in the next: no timer, and the busier the fuller."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class MicroBatcher(Generic[_Item, _Result]):
    """Carries items to `drive`, which gives a result for each, by position, or raises for all that wait.

    State: `_waiting`, items not yet under way, each with its caller's future; `_driver`, the one task that
    carries them; event loop only. A caller that goes away takes its item along if that is not under way yet;
    nobody else notices.
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
        """The item's result. Raises what `drive` raised for the load that it was in."""
        arrival: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._pending.append((item, arrival))
        if self._task is None:
            # Of nobody's trace: it carries others' items too.
            self._task = asyncio.create_task(self._run(), context=Context())
        return await arrival

    async def _run(self) -> None:
        try:
            while load := self._next_batch():
                try:
                    results = await self._process_batch([item for item, _ in load])
                    paired = list(zip(load, results, strict=True))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers' to see
                    while self._pending:  # they would wait for the same
                        load.append(self._pending.popleft())
                    for _, arrival in load:
                        if not arrival.done():
                            arrival.set_exception(error)
                else:
                    for (_, arrival), result in paired:
                        if not arrival.done():
                            arrival.set_result(result)
        finally:
            self._task = None

    def _next_batch(self) -> list[tuple[_Item, "asyncio.Future[_Result]"]]:
        """As many as fit, but at least one, if somebody waits."""
        load: list[tuple[_Item, asyncio.Future[_Result]]] = []
        room = self._max_size
        while self._pending:
            item, arrival = self._pending[0]
            if not arrival.done():
                if load and self._size(item) > room:
                    break
                load.append((item, arrival))
                room -= self._size(item)
            self._pending.popleft()
        return load
