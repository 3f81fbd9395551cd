"""Parse and bind listen addresses, with the same meaning for gRPC and for HTTP.

| spelling | meaning |
|---|---|
| `:PORT`, `0.0.0.0:PORT`, `[::]:PORT` | every address of this machine, IPv4 and IPv6 |
| `localhost:PORT` | 127.0.0.1 and ::1 |
| `127.0.0.1:PORT`, `[::1]:PORT`, `NAME:PORT` | this address, or those of this name, alone |

Of several addresses those that this machine lacks are left out (IPv6 may be turned off).
"""

import errno
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import CommandError, UsageError

_WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - what people write for all addresses
_UNAVAILABLE_ERRNOS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_MAX_PORT = 2**16 - 1
_UNPRIVILEGED_PORT_FILE = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_SocketAddress = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """`host` is without brackets; empty: every address of this machine. `spelled` is as the user wrote it."""

    host: str
    port: int
    original_host: str

    @classmethod
    def parse(cls, text: str) -> "ListenAddress":
        """Read `host:port`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        is_number = port.isascii() and port.isdecimal() and len(port) <= len(str(_MAX_PORT))
        if not colon or not is_number or int(port) > _MAX_PORT or set(bare) & set("[]/@ "):
            message = f"{text!r} must be HOST:PORT, with a port up to {_MAX_PORT}"
            raise ValueError(message)
        if ":" in bare and bare == host:
            message = f"{text!r} must have its IPv6 address in brackets, as in [::1]:50051"
            raise ValueError(message)
        return cls("" if bare in _WILDCARDS else bare, int(port), host)

    def with_port(self, port: int) -> str:
        """Return it as a client writes it, with the port that it really has."""
        return f"{self.original_host or '0.0.0.0'}:{port}"  # noqa: S104


def check_address(text: str, *, flag_name: str, allow_unix: bool = False) -> None:
    """Raise UsageError for an invalid address."""
    if allow_unix and text.startswith("unix:") and text != "unix:":
        return
    try:
        ListenAddress.parse(text)
    except ValueError as error:
        message = f"{flag_name} {error}"
        raise UsageError(message) from error


def bind_sockets(text: str, *, flag_name: str) -> list[socket.socket]:
    """Return a bound socket for every address that `text` means; of port 0, all have the same port.

    Raises CommandError with the reason.
    """
    address = ListenAddress.parse(text)
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, name in _resolve(address):
            port = sockets[0].getsockname()[1] if sockets else address.port
            try:
                sockets.append(_bind(family, (name[0], port, *name[2:])))
            except OSError as error:
                if error.errno not in _UNAVAILABLE_ERRNOS:
                    raise
                absent = error
            else:
                # The first of the two wildcards covers IPv4 and IPv6.
                if not address.host:
                    break
        if absent is not None and not sockets:
            raise absent
    except OSError as error:
        for one in sockets:
            one.close()
        message = f"{flag_name} {text}: {_reason(error, address)}"
        raise CommandError(message) from error
    return sockets


def resolve_bindable_hosts(text: str, *, flag_name: str) -> list[str]:
    """Return the literal addresses that `text` means here, without the port. Raises CommandError."""
    sockets = bind_sockets(text, flag_name=flag_name)
    hosts = []
    for one in sockets:
        with one:
            host = socket.getnameinfo(one.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
            hosts.append(f"[{host}]" if ":" in host else host)
    return hosts


def _resolve(address: ListenAddress) -> list[tuple[socket.AddressFamily, _SocketAddress]]:
    if not address.host:
        return [(socket.AF_INET6, ("::", 0)), (socket.AF_INET, ("0.0.0.0", 0))]  # noqa: S104 - meant
    # Independent of /etc/hosts.
    if address.host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0))]
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, name) for family, _, _, _, name in found))


def _bind(family: socket.AddressFamily, name: _SocketAddress) -> socket.socket:
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, name[0] != "::")
        made.bind(name)
    except BaseException:
        made.close()
        raise
    return made


def _reason(error: OSError, address: ListenAddress) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name {address.host} has no address ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        return f"port {address.port} is taken by another process; stop that process or use another port"
    if error.errno == errno.EACCES:
        return (
            f"port {address.port} needs a right that this process lacks; use a port from "
            f"{_first_unprivileged_port()}, or give the process CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host or 'it'} is not an address of this machine"
    return error.strerror or str(error)


def _first_unprivileged_port() -> int:
    """Return the first port that needs no right: Linux lets the administrator choose."""
    with suppress(OSError, ValueError):
        return int(_UNPRIVILEGED_PORT_FILE.read_text())
    return 1024
