"""Attacks on the HTTP port: unfinished and oversized requests, and responses that are never read."""

import socket
from contextlib import ExitStack
from urllib.request import urlopen

import pytest

from tests.security.conftest import AttackedProxy


def _connect(attacked_proxy: AttackedProxy) -> socket.socket:
    host, _, port = attacked_proxy.proxy.ready["http"].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def _is_probed(attacked_proxy: AttackedProxy) -> bool:
    with urlopen(f"{attacked_proxy.proxy.http_url}/healthz", timeout=30) as response:
        return bool(response.read() == b"ok\n")


def test_oldest_unfinished_requests_are_closed_and_probes_answered(attacked_proxy: AttackedProxy) -> None:
    """Of 200 connections that never end their headers, the oldest are closed."""
    with ExitStack() as stack:
        unfinished = [stack.enter_context(_connect(attacked_proxy)) for _ in range(200)]
        for sock in unfinished:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        assert _is_probed(attacked_proxy)
        assert unfinished[0].recv(1) == b""


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
def test_invalid_request_is_refused_and_not_logged(
    attacked_proxy: AttackedProxy, request_bytes: bytes
) -> None:
    """It gets 400 or a closed connection. A log line would let callers fill the log."""
    lines = len(attacked_proxy.proxy.log_lines)
    with _connect(attacked_proxy) as hostile:
        try:
            hostile.sendall(request_bytes)
            assert hostile.recv(2**16).split(b" ")[1:2] in ([], [b"400"])
        except ConnectionError:
            pass
    assert _is_probed(attacked_proxy)
    assert len(attacked_proxy.proxy.log_lines) == lines


def test_pipelined_requests_with_unread_responses_take_no_memory(attacked_proxy: AttackedProxy) -> None:
    """The proxy stops reading from a connection that sends requests endlessly and reads no response."""
    before_mib = attacked_proxy.rss_mib()
    with _connect(attacked_proxy) as hostile:
        hostile.settimeout(0.2)
        requests = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 5_000_000
        with pytest.raises(TimeoutError):
            hostile.sendall(requests)
        assert _is_probed(attacked_proxy)
        assert attacked_proxy.rss_mib() < before_mib + 64


@pytest.mark.parametrize(
    "rest",
    [
        b"accept: text/plain; version=1.x\r\n\r\n",
        b"accept: application/openmetrics-text; version=\xff\r\n\r\n",
        b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nnoise",
    ],
)
def test_invalid_headers_or_body_of_a_request_are_not_logged(
    attacked_proxy: AttackedProxy, rest: bytes
) -> None:
    """A request for metrics with an unknown version or an invalid body is answered."""
    log_before = attacked_proxy.proxy.log
    with _connect(attacked_proxy) as hostile:
        hostile.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n" + rest)
        assert hostile.recv(2**16).startswith(b"HTTP/1.1 200 ")
        assert _is_probed(attacked_proxy)
    assert attacked_proxy.proxy.log == log_before
