"""Work that must not end: what fails unforeseen is told, and begins anew."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0


async def supervise(
    work: Callable[[], Awaitable[None]], *, what: str, pause_seconds: float = _PAUSE_SECONDS
) -> None:
    """Run `work` for ever, `pause_seconds` after each of its ends; only a cancellation ends it."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - whatever it is, to end silently is worse
            _log.exception("%s failed unexpectedly; it begins anew", what)
        await asyncio.sleep(pause_seconds)
