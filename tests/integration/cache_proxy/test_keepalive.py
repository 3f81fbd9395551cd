"""Keepalive: callers may send a ping every 10 s, with or without an RPC in progress."""

import struct
import threading
import time
from functools import partial

import h2.events
import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.http2_peer import Http2Peer, encode_request, grpc_statuses, open_peer
from tests.support.model_server import Answers, ReceivedCall, answer_all
from tests.support.redis_server import wait_for

_INTERVAL_SECONDS = 10
# gRPC's core closes the connection at the fourth ping that it considers too early.
_PINGS = 5


def _is_acknowledged(caller: Http2Peer, pings: int) -> bool:
    caller.receive(1)
    return sum(isinstance(event, h2.events.PingAckReceived) for event in caller.events) >= pings


@pytest.mark.slow
def test_ping_every_ten_seconds_keeps_connections_open(stage_with: StartProxyEnvironment) -> None:
    """Each ping is acknowledged, on a connection that waits for the model and on an idle one."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    answer = threading.Event()

    def hold_call(call: ReceivedCall) -> Answers:
        answer.wait(90)
        return answer_all(call)

    stage.model.behaviour = hold_call
    with open_peer(stage.proxy.target) as waiting, open_peer(stage.proxy.target) as idle:
        stream = waiting.send_request(encode_request("keepalive", 1))
        wait_for(lambda: stage.model.calls_with("keepalive"), description="the call is at the model")
        for number in range(_PINGS):
            if number:
                time.sleep(_INTERVAL_SECONDS)
            for connection in (waiting, idle):
                connection.h2.ping(struct.pack(">Q", number))
                connection.flush()
                is_acknowledged = partial(_is_acknowledged, connection, number + 1)
                wait_for(is_acknowledged, description="its answer")
        answer.set()
        wait_for(lambda: waiting.receive(1) and grpc_statuses(waiting), description="the answer")
        assert grpc_statuses(waiting) == {stream: 0}
        terminations = [
            event
            for event in (*waiting.events, *idle.events)
            if isinstance(event, h2.events.ConnectionTerminated)
        ]
        assert not terminations
