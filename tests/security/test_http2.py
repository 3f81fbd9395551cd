"""Attacks by HTTP/2: how each ends, and that an honest caller is served during and after it.

Over 250 lines, because docs/security.md lists all attacks by HTTP/2 in one place.
"""

import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from urllib.request import urlopen

import h2.errors
import h2.events
import h2.settings
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from tests.security.conftest import MAX_REQUEST_BYTES, AttackedProxy, attack_proxy
from tests.support.caller import open_caller
from tests.support.http2_peer import (
    INFER_PATH,
    Http2Peer,
    encode_request,
    frame_grpc_message,
    grpc_statuses,
    open_peer,
)
from tests.support.redis_server import wait_for

_STREAMS = 1024
_RESOURCE_EXHAUSTED = StatusCode.RESOURCE_EXHAUSTED.value[0]
_UNIMPLEMENTED = StatusCode.UNIMPLEMENTED.value[0]


def _count_events(connection: Http2Peer, kind: type[h2.events.Event]) -> int:
    return sum(isinstance(event, kind) for event in connection.events)


def _wait_for_settings(connection: Http2Peer) -> None:
    wait_for(
        lambda: connection.receive(1) and _count_events(connection, h2.events.RemoteSettingsChanged),
        description="the proxy greets",
    )


@pytest.mark.slow
def test_streams_over_the_limit_of_a_connection_are_refused(attacked_proxy: AttackedProxy) -> None:
    """The limit is announced in the settings, and each stream over it is refused."""
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        assert hostile.h2.remote_settings.max_concurrent_streams == _STREAMS
        hostile.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 10 * _STREAMS
        hostile.h2.remote_settings.acknowledge()
        for _ in range(_STREAMS + 100):
            hostile.send_headers()
        hostile.flush()
        wait_for(
            lambda: hostile.receive(1) and _count_events(hostile, h2.events.StreamReset) >= 100,
            description="100 are refused",
        )
        assert attacked_proxy.is_serving()


def test_flood_of_pings_closes_its_connection(attacked_proxy: AttackedProxy) -> None:
    """The GOAWAY frame has `too_many_pings`."""
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        for number in range(200):
            hostile.h2.ping(struct.pack(">Q", number))
        hostile.flush()
        with suppress(ConnectionError):
            while hostile.receive():
                pass
        [goaway] = [event for event in hostile.events if isinstance(event, h2.events.ConnectionTerminated)]
        assert goaway.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        assert goaway.additional_data == b"too_many_pings"


@pytest.mark.parametrize(("count", "size"), [(20, 1000), (1, 20_000), (2000, 10)])
def test_metadata_over_16_kib_is_rejected_by_core(
    attacked_proxy: AttackedProxy, count: int, size: int
) -> None:
    """The RPC gets RESOURCE_EXHAUSTED or a closed connection, and never reaches the proxy's code."""
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        stream = hostile.send_headers([(f"x-{number}", "v" * size) for number in range(count)])
        try:
            hostile.send_data(stream, frame_grpc_message(encode_request("metadata", 1)))
            wait_for(lambda: hostile.receive(1) and grpc_statuses(hostile), description="it is refused")
        except ConnectionError:
            return
        assert grpc_statuses(hostile) == {stream: _RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("path", ["/SeniorityModel/No", "nothing", b"/S\xff/\xfe", b"/\xc3", b"\x80" * 1000])
def test_unknown_method_is_unimplemented_and_the_connection_continues(
    attacked_proxy: AttackedProxy, path: str | bytes
) -> None:
    """Also if the name of the method is not UTF-8."""
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        stream = hostile.send_headers(path=path)
        hostile.send_data(stream, frame_grpc_message(b""))
        known = hostile.send_request(encode_request("honest", 0))
        wait_for(
            lambda: hostile.receive(1) and len(grpc_statuses(hostile)) == 2, description="both are answered"
        )
        assert grpc_statuses(hostile) == {stream: _UNIMPLEMENTED, known: 0}


@pytest.mark.parametrize(
    ("path", "metadata", "message"),
    [
        (INFER_PATH, [("authorization", b"Bearer s3cret\xff")], encode_request("honest", 0)),
        (INFER_PATH, [("x-caller", b"\xff"), ("traceparent", b"\xfe")], encode_request("honest", 0)),
        ("/grpc.health.v1.Health/Check", [], b"\xff"),
        ("/grpc.health.v1.Health/Watch", [], b"\xff"),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", [], b"\xff"),
    ],
)
def test_unreadable_metadata_and_messages_are_not_logged(
    attacked_proxy: AttackedProxy, path: str, metadata: list[tuple[str, str | bytes]], message: bytes
) -> None:
    """Metadata that is not UTF-8, with a token in it, and messages that cannot be parsed."""
    log_before = attacked_proxy.proxy.log
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        stream = hostile.send_headers(metadata, path=path)
        hostile.send_data(stream, frame_grpc_message(message))
        wait_for(lambda: hostile.receive(1) and grpc_statuses(hostile), description="it is answered")
    assert attacked_proxy.is_serving()
    assert attacked_proxy.proxy.log == log_before


@pytest.mark.slow
def test_rapid_resets_cancel_no_rpc_of_other_callers(attacked_proxy: AttackedProxy) -> None:
    """During 8,000 streams that are opened and reset at once, an honest caller gets all its responses."""
    calls = [
        attacked_proxy.honest_caller.start_infer([("honest", "t")], timeout_seconds=60) for _ in range(20)
    ]
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        for number in range(8000):
            hostile.h2.reset_stream(hostile.send_headers(), h2.errors.ErrorCodes.CANCEL)
            if number % 100 == 0:
                hostile.flush()
                hostile.receive(0.0005)
                calls.append(attacked_proxy.honest_caller.start_infer([("honest", "t")], timeout_seconds=60))
        hostile.flush()
        assert {call.result().code for call in calls} == {StatusCode.OK}


@pytest.mark.slow
def test_unfinished_messages_over_the_limit_are_rejected(attacked_proxy: AttackedProxy) -> None:
    """Of 20 messages that lack their last byte, four are waited for and the others get pushback."""
    unfinished = frame_grpc_message(bytes(MAX_REQUEST_BYTES - 100))[:-1]
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        streams = []
        for _ in range(20):
            streams.append(hostile.send_headers())
            hostile.send_data(streams[-1], unfinished, end=False)
        wait_for(
            lambda: hostile.receive(1) and len(grpc_statuses(hostile)) >= 16, description="16 are refused"
        )
        assert set(grpc_statuses(hostile).values()) == {_RESOURCE_EXHAUSTED}
        assert len(grpc_statuses(hostile)) == 16
        assert attacked_proxy.is_serving()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Health/Check", "Health/Watch"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_large_or_unfinished_health_requests_are_rejected(
    attacked_proxy: AttackedProxy, method: str, is_whole: bool
) -> None:
    """Health needs no token. Of 20 whole large requests all are rejected, of 20 unfinished ones 16."""
    name = health_pb2.HealthCheckRequest(service="x" * (MAX_REQUEST_BYTES - 100)).SerializeToString()
    sent = frame_grpc_message(name)[: None if is_whole else -1]
    with open_peer(attacked_proxy.proxy.target) as hostile:
        _wait_for_settings(hostile)
        for _ in range(20):
            hostile.send_data(hostile.send_headers(path=f"/grpc.health.v1.{method}"), sent, end=False)
        min_rejected = 20 if is_whole else 16
        wait_for(
            lambda: hostile.receive(1) and len(grpc_statuses(hostile)) >= min_rejected,
            description="they are refused",
        )
        assert attacked_proxy.is_serving()


@pytest.mark.slow
def test_unread_responses_are_limited_to_8_mib(attacked_proxy: AttackedProxy) -> None:
    """A caller that reads no response can have 8 MiB of them held, until it disconnects."""
    message = encode_request("unread", 10_000, uuid=-1)
    answer_bytes = 15 * 10_000
    assert (
        attacked_proxy.honest_caller.infer([("unread", str(number)) for number in range(10_000)]).code
        is StatusCode.OK
    )
    for _ in range(2):
        with open_peer(attacked_proxy.proxy.target, window=0) as hostile:
            _wait_for_settings(hostile)
            sent_count = 0
            while not grpc_statuses(hostile):
                sent_count += 1
                assert sent_count * answer_bytes < 10 * MAX_REQUEST_BYTES, "answers pile up"
                hostile.send_request(message)
                wait_for(
                    lambda: (
                        _count_events(hostile, h2.events.ResponseReceived) == sent_count  # noqa: B023
                        or (hostile.receive(1) and False)
                    ),
                    description="its answer begins",
                )
            assert set(grpc_statuses(hostile).values()) == {_RESOURCE_EXHAUSTED}
            assert sent_count * answer_bytes > 2 * MAX_REQUEST_BYTES
            assert attacked_proxy.is_serving()


@pytest.mark.slow
def test_silent_connections_are_closed_within_a_minute(attacked_proxy: AttackedProxy) -> None:
    """One sends no preface, the other never acknowledges the settings."""
    host, _, port = attacked_proxy.proxy.target.rpartition(":")
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_connection((host, int(port))))
        unacknowledged = stack.enter_context(socket.create_connection((host, int(port))))
        unacknowledged.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        for sock in (silent, unacknowledged):
            sock.settimeout(60)
            while sock.recv(2**16):
                pass


@contextmanager
def _limit_open_files(count: int) -> Iterator[None]:
    """Limit the open files of processes that are started within this context."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_flood_of_connections_leaves_file_descriptors_free() -> None:
    """With 300 files the proxy accepts 150 connections, answers them and probes, and later accepts others."""
    with ExitStack() as limited_files:
        limited_files.enter_context(_limit_open_files(300))
        with attack_proxy() as attacked_proxy:
            limited_files.close()
            with ExitStack() as stack:
                for _ in range(400):
                    stack.enter_context(open_peer(attacked_proxy.proxy.target))
                with urlopen(f"{attacked_proxy.proxy.http_url}/readyz", timeout=30) as response:
                    assert response.status == 200
                assert attacked_proxy.is_serving()
            with open_caller(attacked_proxy.proxy.target) as new:
                wait_for(
                    lambda: new.infer([("honest", "t")], timeout_seconds=5).code is StatusCode.OK,
                    description="a new caller is served",
                )
