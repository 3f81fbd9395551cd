"""Keepalive: callers may send a ping every 10 s, whether or not they wait for an answer."""

import struct
import threading
import time

import h2.events
import pytest

from tests.integration.cache_proxy.conftest import UNPACED, StageWith
from tests.support.http2_peer import Peer, batch, peer, statuses
from tests.support.model_server import Answers, Call, well
from tests.support.redis_server import wait_for

_EVERY_SECONDS = 10
_PINGS = 5  # gRPC's core closes at the fourth that it takes for one too many


def _is_acknowledged(caller: Peer, pings: int) -> bool:
    caller.read(1)
    return sum(isinstance(event, h2.events.PingAckReceived) for event in caller.events) >= pings


@pytest.mark.slow
def test_pings_every_ten_seconds_close_no_connection(stage_with: StageWith) -> None:
    """On a connection that waits for the model, and on one that is idle: each ping is acknowledged."""
    stage = stage_with(*UNPACED)
    answer = threading.Event()

    def held(call: Call) -> Answers:
        answer.wait(90)
        return well(call)

    stage.model.behaviour = held
    with peer(stage.proxy.target) as waiting, peer(stage.proxy.target) as idle:
        stream = waiting.ask(batch("keepalive", 1))
        wait_for(lambda: stage.model.calls_for("keepalive"), what="the call is at the model")
        for number in range(_PINGS):
            if number:
                time.sleep(_EVERY_SECONDS)
            for one in (waiting, idle):
                one.h2.ping(struct.pack(">Q", number))
                one.flush()
                wait_for(lambda one=one, number=number: _is_acknowledged(one, number + 1), what="its answer")  # type: ignore[misc]
        answer.set()
        wait_for(lambda: waiting.read(1) and statuses(waiting), what="the answer")
        assert statuses(waiting) == {stream: 0}
        ended = [
            event
            for event in (*waiting.events, *idle.events)
            if isinstance(event, h2.events.ConnectionTerminated)
        ]
        assert not ended
