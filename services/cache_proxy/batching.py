"""Calls that come while one is under way go together in the next: no timer, and the busier the fuller."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Riders(Generic[_Item, _Result]):
    """Carries items to `drive`, which gives a result for each, by position, or raises for all that wait.

    State: `_waiting`, items not yet under way, each with its caller's future; `_driver`, the one task that
    carries them; event loop only. A caller that goes away takes its item along if that is not under way yet;
    nobody else notices.
    """

    def __init__(
        self, drive: Callable[[Sequence[_Item]], Awaitable[Sequence[_Result]]], *,
        size: Callable[[_Item], int], most: int,
    ) -> None:  # fmt: skip
        self._drive = drive
        self._size = size
        self._most = most
        self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._driver: asyncio.Task[None] | None = None

    async def ride(self, item: _Item) -> _Result:
        """The item's result. Raises what `drive` raised for the load that it was in."""
        arrival: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, arrival))
        if self._driver is None:
            # Of nobody's trace: it carries others' items too.
            self._driver = asyncio.create_task(self._carry(), context=Context())
        return await arrival

    async def _carry(self) -> None:
        try:
            while load := self._next_load():
                try:
                    results = await self._drive([item for item, _ in load])
                    paired = list(zip(load, results, strict=True))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers' to see
                    while self._waiting:  # they would wait for the same
                        load.append(self._waiting.popleft())
                    for _, arrival in load:
                        if not arrival.done():
                            arrival.set_exception(error)
                else:
                    for (_, arrival), result in paired:
                        if not arrival.done():
                            arrival.set_result(result)
        finally:
            self._driver = None

    def _next_load(self) -> list[tuple[_Item, "asyncio.Future[_Result]"]]:
        """As many as fit, but at least one, if somebody waits."""
        load: list[tuple[_Item, asyncio.Future[_Result]]] = []
        room = self._most
        while self._waiting:
            item, arrival = self._waiting[0]
            if not arrival.done():
                if load and self._size(item) > room:
                    break
                load.append((item, arrival))
                room -= self._size(item)
            self._waiting.popleft()
        return load
