"""Addresses of host names, looked up outside the event loop.

uvloop's own lookup goes on when its caller stops waiting, and then logs "Future exception was never
retrieved". The thread pools of asyncio and libuv make the process's end wait for a silent name server.
"""

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from typing import Any

_running_lookups: dict[tuple[asyncio.AbstractEventLoop, str], "asyncio.Future[list[str]]"] = {}


async def resolve_host(host: str) -> list[str]:
    """Return the host's IP addresses in the order to try them. Raises OSError.

    Callers share a lookup that is running; one that stops waiting does not end it.
    """
    with suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    loop = asyncio.get_running_loop()
    running = _running_lookups.get((loop, host))
    if running is None:
        running = _running_lookups[loop, host] = loop.create_future()
        running.add_done_callback(lambda found: _on_lookup_done(loop, host, found))
        threading.Thread(target=_run_lookup, args=(loop, host, running), daemon=True).start()
    return await asyncio.shield(running)


def _on_lookup_done(loop: asyncio.AbstractEventLoop, host: str, lookup: "asyncio.Future[list[str]]") -> None:
    _running_lookups.pop((loop, host), None)
    if not lookup.cancelled():
        lookup.exception()  # retrieved: everyone who asked may have stopped waiting


def _run_lookup(loop: asyncio.AbstractEventLoop, host: str, lookup: "asyncio.Future[list[str]]") -> None:
    addresses: list[str] = []
    error: Exception | None = None
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    except (OSError, UnicodeError) as failure:
        error = failure if isinstance(failure, OSError) else OSError(f"{host} is not a host name")

    def settle(*_: Any) -> None:
        if lookup.done():
            return
        if error is None:
            lookup.set_result(addresses)
        else:
            lookup.set_exception(error)

    with suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(settle)
