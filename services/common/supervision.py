"""Work that must not end: what fails unforeseen is told, and begins anew."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_RESTART_DELAY_SECONDS = 1.0


async def restart_on_failure(
    work: Callable[[], Awaitable[None]], *, name: str, delay_seconds: float = _RESTART_DELAY_SECONDS
) -> None:
    """Run `work` for ever, `pause_seconds` after each of its ends; only a cancellation ends it."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - whatever it is, to end silently is worse
            _log.exception("%s failed unexpectedly; it begins anew", name)
        await asyncio.sleep(delay_seconds)
