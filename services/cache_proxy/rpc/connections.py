"""Close the gRPC server's connections, which are found among the process's open files.

Core ends a server by GOAWAY, and cancels every RPC that arrives before the caller has read that
(https://github.com/grpc/grpc/issues/41785): its caller gets CANCELLED, which no retry policy repeats. A
connection that is closed gives the caller UNAVAILABLE, but gRPC has no function for it.
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

_Address = tuple[int, object, object]  # family, host or path, port
_WILDCARD_HOSTS = ("::", "0.0.0.0")  # noqa: S104 - what the kernel says of a listener on all addresses
_SO_ATTACH_FILTER = 26  # of Linux; Python's socket module does not name it
# A classic BPF program (linux/filter.h) of one instruction: return 0 bytes of the packet.
_RETURN_ZERO = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
_DROP_ALL = struct.pack("HL", 1, ctypes.addressof(_RETURN_ZERO))
_OPEN_FILE_FOLDERS = tuple(map(Path, ("/proc/self/fd", "/dev/fd")))


class ServerConnections:
    """The connections to listeners that were opened within `found`. Where open files cannot be listed: none.

    State: `_listeners`, the addresses of these listeners.
    """

    def __init__(self) -> None:
        self._listener_addresses: frozenset[_Address] = frozenset()

    @contextmanager
    def track_listeners(self) -> Iterator[None]:
        """Note which listeners are opened meanwhile, besides those found before."""
        before = _listeners()
        yield
        self._listener_addresses |= (
            _listeners() - before
        )  # of a server made again, some may not be closed yet

    def stop_accepting(self) -> None:
        """Let nobody connect any more, though the listeners stay open.

        TCP listeners get a socket filter that drops every packet, as core closes no listener by itself. The
        path of a Unix socket is removed. Where the system has no such filter, new connections go on.
        """
        for one in _sockets():
            if not _is_listening(one) or _address(one) not in self._listener_addresses:
                continue
            with suppress(OSError):
                if one.family == socket.AF_UNIX:
                    Path(one.getsockname()).unlink()
                elif sys.platform == "linux":
                    one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_ALL)

    def count(self) -> int:
        """Return how many are open."""
        return sum(1 for one in _sockets() if self._is_tracked(one))

    def close_all(self) -> None:
        """Close them all. Each caller reads what was sent, then that the connection is closed."""
        for one in _sockets():
            if self._is_tracked(one):
                with suppress(OSError):  # the caller was faster
                    one.shutdown(socket.SHUT_RDWR)

    def _is_tracked(self, one: socket.socket) -> bool:
        if _is_listening(one):
            return False
        try:
            family, host, port = _address(one)
            one.getpeername()
        except OSError:  # it is closed, or was never connected
            return False
        return any((family, either, port) in self._listener_addresses for either in (host, *_WILDCARD_HOSTS))


def _listeners() -> frozenset[_Address]:
    return frozenset(_address(one) for one in _sockets() if _is_listening(one))


def _sockets() -> Iterator[socket.socket]:
    """Yield each open socket of a stream as a copy, so that its number cannot become another's meanwhile."""
    folder = next((one for one in _OPEN_FILE_FOLDERS if one.is_dir()), None)
    for file in [] if folder is None else folder.iterdir():
        with suppress(OSError):  # it is closed by now
            copy = os.dup(int(file.name))
            if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                os.close(copy)
                continue
            with socket.socket(fileno=copy) as one:
                if one.type == socket.SOCK_STREAM and one.family in (
                    socket.AF_INET,
                    socket.AF_INET6,
                    socket.AF_UNIX,
                ):
                    yield one


def _is_listening(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _address(one: socket.socket) -> _Address:
    name = one.getsockname()
    return (one.family, name, None) if one.family == socket.AF_UNIX else (one.family, name[0], name[1])
