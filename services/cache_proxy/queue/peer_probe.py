"""HTTP probes of replicas whose heartbeats have stopped.

A probe distinguishes a replica that ended or is paused from one that runs but lost Redis. Only the last one
calls the model in slots of its own, so only its slots must be left free:

- A refused connection, or an answer with another replica's id, means that the replica has ended.
- A connection without an answer means that it is paused.
- Anything else, no route for instance, proves nothing, and its slots stay free.

The addresses come from Redis, so anyone who may write there chooses them. A probe is therefore one short GET
of one path without redirections, and only a few run at a time.
"""

import asyncio
import enum
import re

import aiohttp

from services.cache_proxy.errors import StoreError
from services.cache_proxy.queue.queue_scripts import Scripts
from services.common.tasks import cancel_and_wait

REPLICA_ID_PATH = "/replica"

_CONNECT_TIMEOUT_SECONDS = 0.2
_TIMEOUT = aiohttp.ClientTimeout(
    total=1.0, sock_connect=_CONNECT_TIMEOUT_SECONDS, sock_read=_CONNECT_TIMEOUT_SECONDS
)
_STATE_TTL_MS = 3000
_MAX_PROBES = 16
_MAX_ID_BYTES = 200
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")


class PeerState(enum.StrEnum):
    """What a probe found about a replica. The values are the arguments of `set_peer_state.lua`."""

    ALIVE = "alive"
    GONE = "gone"
    PAUSED = "paused"


class PeerProber:
    """Probes replicas, and records in Redis what it finds.

    State, touched only from the event loop: `_probes`, the probe under way for each replica.
    """

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._session: aiohttp.ClientSession | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}

    def probe(self, replica: str, address: str) -> None:
        """Start a probe of a replica, unless one is under way. It takes about a second at most."""
        if not _ADDRESS.fullmatch(address) or len(self._probes) >= _MAX_PROBES:
            return
        if replica not in self._probes:
            task = asyncio.create_task(self._probe_and_record(replica, address))
            self._probes[replica] = task
            task.add_done_callback(lambda _: self._probes.pop(replica, None))

    async def close(self) -> None:
        """Cancel all probes."""
        await cancel_and_wait(list(self._probes.values()))
        if self._session is not None:
            await self._session.close()

    async def _probe_and_record(self, replica: str, address: str) -> None:
        state = await self._probe_once(replica, address)
        if state is None:
            return
        try:
            await self._scripts.run("set_peer_state", [replica, state.value, _STATE_TTL_MS])
        except StoreError:
            # The next heartbeat notices that Redis is lost.
            return

    async def _probe_once(self, replica: str, address: str) -> PeerState | None:
        """Return the state of a replica, None if the probe proves nothing."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar())
        url = f"http://{address}{REPLICA_ID_PATH}"
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                body = await response.content.read(_MAX_ID_BYTES)
        except aiohttp.ClientConnectorError as error:
            is_refused = isinstance(error.os_error, ConnectionRefusedError)
            return PeerState.GONE if is_refused else None
        except aiohttp.SocketTimeoutError:
            return PeerState.PAUSED
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        found = body.decode("ascii", "replace").strip()
        return PeerState.ALIVE if found == replica else PeerState.GONE
