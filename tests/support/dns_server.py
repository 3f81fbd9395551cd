"""A DNS server that resolves every name to one address, which the test can change."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TYPE_A = 1
_HEADER_BYTES = 12
# The name in the question ends with a zero byte, after which its type and its class follow (two bytes each).
_AFTER_NAME_BYTES = 5
_NOT_FOUND = 3


class DnsServer:
    """A DNS server on UDP. Its records have a TTL of zero.

    State: `address`, the address in A records. None means that the name does not exist.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def grpc_target(self, port: int) -> str:
        """Return a gRPC target that is resolved by this server.

        C-ares takes the resolver's address from the authority of the target.
        """
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/model.test:{port}"

    def close(self) -> None:
        """Stop the server. An empty datagram ends its thread."""
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
        end = query.index(b"\0", _HEADER_BYTES) + _AFTER_NAME_BYTES
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
    """Run a DNS server."""
    server = DnsServer(address)
    try:
        yield server
    finally:
        server.close()
