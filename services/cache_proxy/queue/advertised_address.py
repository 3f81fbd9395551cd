"""The address under which other replicas reach this one's HTTP endpoint."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from services.cache_proxy.config import cache_url
from services.cache_proxy.redis_client.host_lookup import resolve_host
from services.common.tasks import cancel_and_wait

_LOOKUP_TIMEOUT_SECONDS = 1.0
_LOOPBACK = "127.0.0.1"
_ALL_ADDRESSES = frozenset({"", "0.0.0.0", "[::]", "::"})  # noqa: S104 - compared, not bound


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvertisedAddress:
    """Finds the address of this replica's HTTP endpoint for other replicas.

    `http_bound` is the address on which HTTP listens, `redis_url` the value of `--cache-url`.
    """

    http_bound: str
    redis_url: str

    async def find(self) -> str:
        """Return HOST:PORT, or an empty string where other replicas cannot reach the endpoint.

        If HTTP listens on all addresses, the host is the source address of the route to Redis. If it listens
        on a loopback address, there is none unless Redis is on this machine, too: on another machine the same
        address leads to another process.
        """
        host, _, port = self.http_bound.rpartition(":")
        listens_on_all = host in _ALL_ADDRESSES
        if not listens_on_all and not _is_loopback(host):
            return self.http_bound
        own = await self._source_address()
        if not listens_on_all:
            return self.http_bound if _is_loopback(own) else ""
        if not own:
            return ""
        return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"

    async def _source_address(self) -> str:
        hosts = cache_url.parse(self.redis_url).hosts
        if not hosts:
            return _LOOPBACK
        lookups = [asyncio.create_task(resolve_host(host)) for host, _ in hosts]
        try:
            await asyncio.wait(lookups, timeout=_LOOKUP_TIMEOUT_SECONDS)
            found = [lookup.result() for lookup in lookups if lookup.done() and not lookup.exception()]
        finally:
            await cancel_and_wait(lookups)
        return next(filter(None, map(_first_source_address, found)), "")


def _first_source_address(addresses: Sequence[str]) -> str:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                # Connecting a datagram socket only chooses the route, and sends nothing.
                probe.connect((address, cache_url.DEFAULT_REDIS_PORT))
                own: str = probe.getsockname()[0]
                return own
        except OSError:
            # There is no route to this address.
            continue
    return ""


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1", "[::1]"} or host.startswith("127.")
