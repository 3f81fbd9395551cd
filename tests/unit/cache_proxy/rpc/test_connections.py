"""Only connections to tracked listeners are counted and closed."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from services.cache_proxy.rpc.connections import ServerConnections


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close every socket of a test."""
    with ExitStack() as opened:
        yield opened


def _listen(stack: ExitStack, family: int, address: object) -> socket.socket:
    listener = stack.enter_context(socket.socket(family))
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(address)  # type: ignore[arg-type]
    listener.listen()
    return listener


def _connect(stack: ExitStack, listener: socket.socket, family: int, address: object) -> socket.socket:
    """Return the caller's end of a connection. The accepted end stays open too."""
    caller = stack.enter_context(socket.socket(family))
    caller.settimeout(10)
    caller.connect(address)  # type: ignore[arg-type]
    stack.enter_context(listener.accept()[0])
    return caller


@pytest.mark.parametrize(
    ("family", "host", "to"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_close_all_closes_connections_of_tracked_listeners_only(
    stack: ExitStack, family: int, host: str, to: str
) -> None:
    """Connections of a listener that was opened before stay open."""
    other = _listen(stack, socket.AF_INET, ("127.0.0.1", 0))
    staying = _connect(stack, other, socket.AF_INET, other.getsockname())
    connections = ServerConnections()
    with connections.track_listeners():
        ours = _listen(stack, family, (host, 0))
    assert connections.count() == 0
    ending = _connect(stack, ours, socket.AF_INET, (to, ours.getsockname()[1]))
    assert connections.count() == 1
    connections.close_all()
    assert ending.recv(1) == b""
    staying.settimeout(0.1)
    with pytest.raises(TimeoutError):
        staying.recv(1)


def test_close_all_closes_connections_of_a_unix_socket(stack: ExitStack) -> None:
    """The only address of such a connection is the listener's path."""
    folder = stack.enter_context(TemporaryDirectory(prefix="s"))
    path = str(Path(folder) / "s")
    connections = ServerConnections()
    with connections.track_listeners():
        listener = _listen(stack, socket.AF_UNIX, path)
    ending = _connect(stack, listener, socket.AF_UNIX, path)
    assert connections.count() == 1
    connections.close_all()
    assert ending.recv(1) == b""


def test_listeners_tracked_before_a_restart_stay_tracked(stack: ExitStack) -> None:
    """Also if the previous listener is still open, so that no new one appears."""
    connections = ServerConnections()
    with connections.track_listeners():
        listener = _listen(stack, socket.AF_INET, ("127.0.0.1", 0))
    with connections.track_listeners():
        pass
    _connect(stack, listener, socket.AF_INET, listener.getsockname())
    assert connections.count() == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_stop_accepting_refuses_new_tcp_connections_only(stack: ExitStack, host: str) -> None:
    """Existing connections continue, and other listeners still accept."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    other = _listen(stack, socket.AF_INET, ("127.0.0.1", 0))
    connections = ServerConnections()
    with connections.track_listeners():
        ours = _listen(stack, family, (host, 0))
    address = ("127.0.0.1", ours.getsockname()[1])
    staying = stack.enter_context(socket.create_connection(address, timeout=10))
    accepted = stack.enter_context(ours.accept()[0])
    connections.stop_accepting()
    with pytest.raises(TimeoutError):
        socket.create_connection(address, timeout=0.3)
    accepted.sendall(b"x")
    assert staying.recv(1) == b"x"
    staying.sendall(b"y")
    assert accepted.recv(1) == b"y"
    stack.enter_context(socket.create_connection(other.getsockname(), timeout=10))


def test_stop_accepting_removes_the_path_of_a_unix_socket(stack: ExitStack) -> None:
    """A caller finds no socket there."""
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "s")
        connections = ServerConnections()
        with connections.track_listeners():
            _listen(stack, socket.AF_UNIX, path)
        connections.stop_accepting()
        caller = stack.enter_context(socket.socket(socket.AF_UNIX))
        with pytest.raises(FileNotFoundError):
            caller.connect(path)
