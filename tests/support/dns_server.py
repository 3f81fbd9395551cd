"""A DNS server that gives one name whatever address a test wants at the moment."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TYPE_A = 1
_HEADER_BYTES = 12
_NOT_FOUND = 3


class DnsServer:
    """Answers on UDP, with a lifetime of no time at all.

    State: `address`, what A records hold; None: the name does not exist.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def grpc_target(self, port: int) -> str:
        """A gRPC target that asks this server: for C-ares the resolver's address is the authority."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/model.test:{port}"

    def close(self) -> None:
        """End it."""
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._response(query), sender)

    def _response(self, query: bytes) -> bytes:
        end = query.index(b"\0", _HEADER_BYTES) + 5  # of the name, the type and the class
        (kind,) = struct.unpack_from(">H", query, end - 4)
        address = self.address
        records = b""
        if address is not None and kind == _TYPE_A:
            records = b"\xc0\x0c" + struct.pack(">HHIH", _TYPE_A, 1, 0, 4) + socket.inet_aton(address)
        code = _NOT_FOUND if address is None else 0
        header = query[:2] + struct.pack(">HHHHH", 0x8580 | code, 1, bool(records), 0, 0)
        return header + query[_HEADER_BYTES:end] + records


@contextmanager
def dns_server(address: str | None) -> Iterator[DnsServer]:
    """A server for as long as the block lasts."""
    made = DnsServer(address)
    try:
        yield made
    finally:
        made.close()
