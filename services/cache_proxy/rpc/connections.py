"""Close the gRPC server's connections, which are found among the process's open files.

gRPC's core ends a server by GOAWAY, and cancels every RPC that arrives before the caller has read that
(https://github.com/grpc/grpc/issues/41785). The caller gets CANCELLED, which no retry policy retries. Closing
the connection gives the caller UNAVAILABLE instead, but gRPC has no function for it.
"""

import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Family, host or path, port.
_Address = tuple[int, object, object]
# How the kernel reports a listener on all addresses.
_WILDCARD_HOSTS = ("::", "0.0.0.0")  # noqa: S104
# From Linux; Python's socket module does not define it.
_SO_ATTACH_FILTER = 26
# A classic BPF program (linux/filter.h) of one instruction: keep 0 bytes of the packet.
_RETURN_ZERO = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
_DROP_ALL = struct.pack("HL", 1, ctypes.addressof(_RETURN_ZERO))
_OPEN_FILE_FOLDERS = tuple(map(Path, ("/proc/self/fd", "/dev/fd")))
_STREAM_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class ServerConnections:
    """The connections to the listeners that were opened within `track_listeners`.

    Where the system cannot list open files, there are none.

    State: `_listener_addresses`, the addresses of these listeners.
    """

    def __init__(self) -> None:
        self._listener_addresses: frozenset[_Address] = frozenset()

    @contextmanager
    def track_listeners(self) -> Iterator[None]:
        """Add the listeners that are opened within this context."""
        before = _listeners()
        yield
        # Earlier ones are kept: when a server is restarted, its previous listeners may still be open.
        self._listener_addresses |= _listeners() - before

    def stop_accepting(self) -> None:
        """Accept no more connections, though the listeners stay open.

        Core does not close a listener on request. A TCP listener therefore gets a socket filter that drops
        every packet, and the path of a Unix socket is removed. Where the system has no such filter, new
        connections are still accepted.
        """
        for sock in _sockets():
            if not _is_listening(sock) or _address(sock) not in self._listener_addresses:
                continue
            with suppress(OSError):
                if sock.family == socket.AF_UNIX:
                    Path(sock.getsockname()).unlink()
                elif sys.platform == "linux":
                    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_ALL)

    def count(self) -> int:
        """Return how many connections are open."""
        return sum(1 for sock in _sockets() if self._is_tracked(sock))

    def close_all(self) -> None:
        """Close every connection. A caller reads what was already sent, then the end of the connection."""
        for sock in _sockets():
            if self._is_tracked(sock):
                # The caller may have closed it first.
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _is_tracked(self, sock: socket.socket) -> bool:
        if _is_listening(sock):
            return False
        try:
            family, host, port = _address(sock)
            sock.getpeername()
        except OSError:
            # The socket is closed, or was never connected.
            return False
        return any((family, either, port) in self._listener_addresses for either in (host, *_WILDCARD_HOSTS))


def _listeners() -> frozenset[_Address]:
    return frozenset(_address(sock) for sock in _sockets() if _is_listening(sock))


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each open stream socket, whose descriptor cannot be reused by another thread."""
    folder = next((folder for folder in _OPEN_FILE_FOLDERS if folder.is_dir()), None)
    for file in [] if folder is None else folder.iterdir():
        # The file may be closed by now.
        with suppress(OSError):
            duplicate = os.dup(int(file.name))
            if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
                os.close(duplicate)
                continue
            with socket.socket(fileno=duplicate) as sock:
                if sock.type == socket.SOCK_STREAM and sock.family in _STREAM_FAMILIES:
                    yield sock


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _address(sock: socket.socket) -> _Address:
    name = sock.getsockname()
    return (sock.family, name, None) if sock.family == socket.AF_UNIX else (sock.family, name[0], name[1])
