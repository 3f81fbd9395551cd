"""The HTTP port: half requests, long ones, and many whose answers nobody reads."""

import socket
from contextlib import ExitStack
from urllib.request import urlopen

import pytest

from tests.security.conftest import AttackedProxy


def _connect(siege: AttackedProxy) -> socket.socket:
    host, _, port = siege.proxy.ready["http"].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def _is_probed(siege: AttackedProxy) -> bool:
    with urlopen(f"{siege.proxy.http_url}/healthz", timeout=30) as response:
        return bool(response.read() == b"ok\n")


def test_half_requests_make_room_for_whole_ones(siege: AttackedProxy) -> None:
    """Of 200 that never end their headers the oldest are gone; probes are answered."""
    with ExitStack() as stack:
        half = [stack.enter_context(_connect(siege)) for _ in range(200)]
        for one in half:
            one.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        assert _is_probed(siege)
        assert half[0].recv(1) == b""


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"y" * 100_000,
        b"GET /metrics HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000,
        b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(range(256)) * 4,
    ],
    ids=["path", "header", "headers", "HTTP/2", "noise"],
)
def test_what_is_no_request_is_refused_and_not_logged(siege: AttackedProxy, request_bytes: bytes) -> None:
    """400, or the connection's end; not a line of the log, which callers could fill."""
    lines = len(siege.proxy.log_lines)
    with _connect(siege) as hostile:
        try:
            hostile.sendall(request_bytes)
            assert hostile.recv(2**16).split(b" ")[1:2] in ([], [b"400"])
        except ConnectionError:
            pass
    assert _is_probed(siege)
    assert len(siege.proxy.log_lines) == lines


def test_answers_to_pipelined_requests_wait_for_their_reader(siege: AttackedProxy) -> None:
    """Who sends requests without end and reads nothing is not read from any more, and takes no memory."""
    before_mib = siege.rss_mib()
    with _connect(siege) as hostile:
        hostile.settimeout(0.2)
        flood = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 5_000_000
        with pytest.raises(TimeoutError):
            hostile.sendall(flood)
        assert _is_probed(siege)
        assert siege.rss_mib() < before_mib + 64


@pytest.mark.parametrize(
    "rest",
    [
        b"accept: text/plain; version=1.x\r\n\r\n",
        b"accept: application/openmetrics-text; version=\xff\r\n\r\n",
        b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nnoise",
    ],
)
def test_what_goes_with_a_request_is_not_logged(siege: AttackedProxy, rest: bytes) -> None:
    """Who asks for metrics in no version, or with what is no body, gets them; nobody hears of it."""
    told = siege.proxy.log
    with _connect(siege) as hostile:
        hostile.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + rest)
        assert hostile.recv(2**16).startswith(b"HTTP/1.1 200 ")
        assert _is_probed(siege)
    assert siege.proxy.log == told
