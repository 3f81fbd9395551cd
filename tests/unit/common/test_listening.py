"""Addresses to listen on: which spelling means what, and why one cannot be had."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext

import pytest

from services.common.errors import CommandError, UsageError
from services.common.listening import ListenAddress, bind_sockets, check_address, resolve_bindable_hosts


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("h:0", True),
        ("0.0.0.0:65535", True),
        ("[::1]:80", True),
        ("unix:/a", True),
        ("unix:a", True),
        (":80", True),
        ("[fe80::1%eth0]:80", True),
        ("h", False),
        ("h:", False),
        ("h:65536", False),
        ("h:-1", False),
        ("h:+1", False),
        ("h:٣", False),
        ("unix:", False),
        ("", False),
        ("h:8_0", False),
        ("h: 80", False),
        ("::1:80", False),
        ("http://h:80", False),
        ("[::1:80", False),
        ("u@h:80", False),
        ("a b:80", False),
    ],
)
def test_address_without_host_or_valid_port_is_rejected(text: str, good: bool) -> None:
    """A port beyond the last one is not quietly taken modulo 65536; an IPv6 address has brackets."""
    expected = (
        nullcontext() if good else pytest.raises(UsageError, match=re.escape(f"--listen {text!r} must "))
    )
    with expected:
        check_address(text, flag_name="--listen", allow_unix=True)


def test_unix_socket_is_accepted_only_where_allowed() -> None:
    """`--http-listen` has none."""
    with pytest.raises(UsageError):
        check_address("unix:/a", flag_name="--http-listen")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes every socket of a test."""
    with ExitStack() as opened:
        yield opened


def has_ipv6() -> bool:
    """Whether this machine can be reached on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


SPELLINGS = [
    ("0.0.0.0", {"127.0.0.1", "::1"}),
    ("[::]", {"127.0.0.1", "::1"}),
    ("", {"127.0.0.1", "::1"}),
    ("localhost", {"127.0.0.1", "::1"}),
    ("127.0.0.1", {"127.0.0.1"}),
    ("[::1]", {"::1"}),
]
"""Hosts, and where of this machine's loopback addresses they are reached."""


@pytest.mark.parametrize(("host", "reached"), SPELLINGS)
def test_each_spelling_listens_only_on_its_addresses(stack: ExitStack, host: str, reached: set[str]) -> None:
    """All on the same port, also where the system picks it."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    sockets = [stack.enter_context(one) for one in bind_sockets(f"{host}:0", flag_name="--listen")]
    for one in sockets:
        one.listen()
    [port] = {one.getsockname()[1] for one in sockets}
    for to in ("127.0.0.1", "::1"):
        with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET) as caller:
            assert (caller.connect_ex((to, port)) == 0) is (to in reached)


@pytest.mark.parametrize(
    ("text", "ready"),
    [(":5", "0.0.0.0:7"), ("[::]:5", "[::]:7"), ("[::1]:5", "[::1]:7"), ("localhost:5", "localhost:7")],
)
def test_bound_address_is_reported_as_a_client_writes_it(text: str, ready: str) -> None:
    """With the port that it really has."""
    assert ListenAddress.parse(text).with_port(7) == ready


def test_bind_failure_reports_specific_reason(
    stack: ExitStack,
) -> None:
    """Each says what to do, or what is wrong with the host."""
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    for text, reason in (
        (f"127.0.0.1:{port}", f"port {port} is taken by another process"),
        (f"localhost:{port}", f"port {port} is taken by another process"),
        (f":{port}", f"port {port} is taken by another process"),
        ("192.0.2.77:0", "192.0.2.77 is not an address of this machine"),
        ("nowhere.invalid:0", "the name nowhere.invalid has no address"),
    ):
        for attempt in (bind_sockets, resolve_bindable_hosts):
            with pytest.raises(CommandError, match=re.escape(f"--http-listen {text}: {reason}")):
                attempt(text, flag_name="--http-listen")
