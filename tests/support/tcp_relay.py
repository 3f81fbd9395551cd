"""A TCP relay in a thread, through which a test cuts connections and injects responses of an S3 server."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

SLOW_DOWN_RESPONSE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 78\r\n"
    b"Connection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
)

NOT_IMPLEMENTED_RESPONSE = (
    b"HTTP/1.1 501 Not Implemented\r\nContent-Type: application/xml\r\nContent-Length: 82\r\n"
    b"Connection: close\r\n\r\n"
    b"<Error><Code>NotImplemented</Code><Message>A header is not known</Message></Error>"
)

ACCESS_DENIED_RESPONSE = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 73\r\n"
    b"Connection: close\r\n\r\n"
    b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
)


def error_response(status: int, code: str) -> bytes:
    """Return an S3 server's error response."""
    body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
    return (
        f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


def reject_conditional_writes(data: bytes) -> bytes | None:
    """Reject each conditional PUT and POST, as a server without conditional writes does."""
    head = data.partition(b"\r\n\r\n")[0].lower()
    is_conditional = b"\r\nif-none-match:" in head or b"\r\nif-match:" in head
    return NOT_IMPLEMENTED_RESPONSE if is_conditional and head.startswith((b"put ", b"post ")) else None


def deny_upload_listings(data: bytes) -> bytes | None:
    """Reject each listing of multipart uploads, as a server does that does not permit it."""
    line = data.partition(b"\r\n")[0]
    lists_uploads = line.startswith(b"GET ") and b"uploads" in line.partition(b"?")[2]
    return ACCESS_DENIED_RESPONSE if lists_uploads else None


@dataclass
class TcpRelay:
    """A running relay.

    `plan` decides about a connection by its number: it returns how many bytes of the response pass before the
    connection is cut, a response that is sent in place of the server's, or None to relay everything.
    """

    url: str
    plan: Callable[[int], int | bytes | None]
    connection_count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_connection_number(self) -> int:
        """Count a new connection and return its number, from 0."""
        with self._lock:
            self.connection_count += 1
            return self.connection_count - 1


@contextmanager
def tcp_relay(
    target_url: str,
    plan: Callable[[int], int | bytes | None] = lambda _: None,
    *,
    reject: Callable[[bytes], bytes | None] = lambda _: None,
) -> Iterator[TcpRelay]:
    """Run a relay to the server at `target_url`.

    Where `plan` returns None, everything passes except requests for which `reject` returns a response.
    """
    host, port = target_url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    opened = TcpRelay(f"http://127.0.0.1:{listener.getsockname()[1]}", plan)

    def serve(client: socket.socket) -> None:
        limit = plan(opened.next_connection_number())
        with client, suppress(OSError):
            if isinstance(limit, bytes):
                is_head = client.recv(65536).startswith(b"HEAD ")
                client.sendall(limit.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if is_head else limit)
                return
            with socket.create_connection((host, int(port))) as server:
                threading.Thread(target=_pump, args=(client, server, None, reject), daemon=True).start()
                _pump(server, client, limit)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield opened
    finally:
        listener.close()


def _pump(
    source: socket.socket,
    sink: socket.socket,
    limit: int | None,
    reject: Callable[[bytes], bytes | None] = lambda _: None,
) -> None:
    """Copy data until the end or the limit, then shut down both sockets."""
    remaining = limit
    with suppress(OSError):
        while data := source.recv(65536):
            if response := reject(data):
                source.sendall(response)
                source.shutdown(socket.SHUT_WR)
                # Read the rest of the request. Otherwise the socket is reset and the response is lost.
                while source.recv(65536):
                    pass
                break
            sink.sendall(data if remaining is None else data[:remaining])
            if remaining is not None:
                remaining -= len(data)
                if remaining <= 0:
                    break
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
