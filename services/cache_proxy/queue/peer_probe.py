"""Knocks at the doors of replicas that Redis does not hear, to tell the dead and the paused from the cut-off.

Only a replica that lives and lost Redis calls the model at moments of its own, so only its moments must be
left free. A refused connection, or another replica behind the door, means that it is gone; a door that opens
and nobody speaks, that it is paused. Whatever else is found (no route, say) proves nothing: its moments stay
free.

The addresses come from Redis, so whoever writes there chooses them: a knock is one short GET of one path, led
nowhere else, and few are under way.
"""

import asyncio
import re

import aiohttp

from services.cache_proxy.errors import StoreError
from services.cache_proxy.queue.queue_scripts import Scripts
from services.common.tasks import cancel_and_wait

REPLICA_ID_PATH = "/replica"
_CONNECT_TIMEOUT_SECONDS = 0.2
_STATE_TTL_MS = 3000
_TIMEOUT = aiohttp.ClientTimeout(
    total=1.0, sock_connect=_CONNECT_TIMEOUT_SECONDS, sock_read=_CONNECT_TIMEOUT_SECONDS
)
_MAX_PROBES = 16
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")


class PeerProber:
    """State: `_knocking`, one knock at a time at each door."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._session: aiohttp.ClientSession | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}

    def probe(self, replica: str, address: str) -> None:
        """Find out about a replica, and tell Redis; it takes less than a second."""
        if not _ADDRESS.fullmatch(address) or len(self._probes) >= _MAX_PROBES:
            return
        if replica not in self._probes:
            task = asyncio.create_task(self._probe_and_record(replica, address))
            self._probes[replica] = task
            task.add_done_callback(lambda _: self._probes.pop(replica, None))

    async def close(self) -> None:
        """Stop knocking."""
        await cancel_and_wait(list(self._probes.values()))
        if self._session is not None:
            await self._session.close()

    async def _probe_and_record(self, replica: str, address: str) -> None:
        found = await self._probe_once(replica, address)
        if found:
            try:
                await self._scripts.run("set_peer_state", [replica, found, _STATE_TTL_MS])
            except StoreError:
                return  # the heartbeat finds out about Redis

    async def _probe_once(self, replica: str, address: str) -> str | None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar())
        try:
            async with self._session.get(
                f"http://{address}{REPLICA_ID_PATH}", allow_redirects=False
            ) as answer:
                there = (await answer.content.read(200)).decode("ascii", "replace").strip()
                return "alive" if there == replica else "gone"
        except aiohttp.ClientConnectorError as error:
            return "gone" if isinstance(error.os_error, ConnectionRefusedError) else None
        except aiohttp.SocketTimeoutError:
            return "paused"
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
