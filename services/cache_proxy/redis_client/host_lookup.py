"""Look up the addresses of host names outside the event loop.

uvloop's own look-up continues when its caller stops waiting, and then logs "Future exception was never
retrieved". The thread pools of asyncio and libuv delay the end of the process until a silent name server
replies.
"""

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from typing import Any

_running_lookups: dict[tuple[asyncio.AbstractEventLoop, str], "asyncio.Future[list[str]]"] = {}


async def resolve_host(host: str) -> list[str]:
    """Return the IP addresses of a host in the order in which to try them. Raises OSError.

    Callers share a running look-up; cancelling a caller does not end it.
    """
    with suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    loop = asyncio.get_running_loop()
    lookup = _running_lookups.get((loop, host))
    if lookup is None:
        lookup = loop.create_future()
        _running_lookups[loop, host] = lookup
        lookup.add_done_callback(lambda done: _on_lookup_done(loop, host, done))
        threading.Thread(target=_run_lookup, args=(loop, host, lookup), daemon=True).start()
    return await asyncio.shield(lookup)


def _on_lookup_done(loop: asyncio.AbstractEventLoop, host: str, lookup: "asyncio.Future[list[str]]") -> None:
    _running_lookups.pop((loop, host), None)
    if not lookup.cancelled():
        # Retrieve the exception, else asyncio logs it if every caller has stopped waiting.
        lookup.exception()


def _run_lookup(loop: asyncio.AbstractEventLoop, host: str, lookup: "asyncio.Future[list[str]]") -> None:
    """Look up a host in this thread and set the result of `lookup` in its event loop."""
    addresses: list[str] = []
    error: Exception | None = None
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    except (OSError, UnicodeError) as failure:
        error = failure if isinstance(failure, OSError) else OSError(f"{host} is not a host name")

    def set_outcome(*_: Any) -> None:
        if lookup.done():
            return
        if error is None:
            lookup.set_result(addresses)
        else:
            lookup.set_exception(error)

    # The loop may have been closed meanwhile.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(set_outcome)
