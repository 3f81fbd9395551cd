"""A way to a server that breaks as the test wants: a TCP relay in a thread."""

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


def error_response(status: int, code: str) -> bytes:
    """Return an S3 server's answer that refuses a request."""
    body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
    return (
        f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


def reject_conditional_writes(data: bytes) -> bytes | None:
    """A server that refuses every PUT and POST on a condition."""
    head = data.partition(b"\r\n\r\n")[0].lower()
    on_condition = b"\r\nif-none-match:" in head or b"\r\nif-match:" in head
    return NOT_IMPLEMENTED_RESPONSE if on_condition and head.startswith((b"put ", b"post ")) else None


ACCESS_DENIED_RESPONSE = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 73\r\n"
    b"Connection: close\r\n\r\n"
    b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
)


def deny_upload_listings(data: bytes) -> bytes | None:
    """A server where whoever asks may not list uploads."""
    line = data.partition(b"\r\n")[0]
    return (
        ACCESS_DENIED_RESPONSE if line.startswith(b"GET ") and b"uploads" in line.partition(b"?")[2] else None
    )


@dataclass
class TcpRelay:
    """`connections` counts them; `plan` says for the nth how many bytes pass, or what is said instead."""

    url: str
    plan: Callable[[int], int | bytes | None]
    connection_count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_connection_number(self) -> int:
        """Of a new connection."""
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
    """To the server at `target_url`; None from `plan`: all passes, but for requests that `refuse` answers."""
    host, port = target_url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    made = TcpRelay(f"http://127.0.0.1:{listener.getsockname()[1]}", plan)

    def serve(near: socket.socket) -> None:
        limit = plan(made.next_connection_number())
        with near, suppress(OSError):
            if isinstance(limit, bytes):
                to_head = near.recv(65536).startswith(b"HEAD ")
                near.sendall(limit.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if to_head else limit)
                return
            with socket.create_connection((host, int(port))) as far:
                threading.Thread(target=_pump, args=(near, far, None, reject), daemon=True).start()
                _pump(far, near, limit)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=serve, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield made
    finally:
        listener.close()


def _pump(
    source: socket.socket,
    sink: socket.socket,
    limit: int | None,
    reject: Callable[[bytes], bytes | None] = lambda _: None,
) -> None:
    """Until the end, or the limit: then both sides are cut off."""
    left = limit
    with suppress(OSError):
        while data := source.recv(65536):
            if answer := reject(data):
                source.sendall(answer)
                source.shutdown(socket.SHUT_WR)
                while source.recv(65536):  # what is left of the request: else the answer would be lost
                    pass
                break
            sink.sendall(data if left is None else data[:left])
            if left is not None:
                left -= len(data)
                if left <= 0:
                    break
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
