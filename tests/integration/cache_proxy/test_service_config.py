"""A plain gRPC client that loads `protos/service_config.json`, and nothing else, rides through it all."""

import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import Pairs, make_pairs, read_metrics
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    answer_all,
    scripted_level,
    scripted_model,
)
from tests.support.processes import ROOT, cache_proxy
from tests.support.redis_server import wait_for

CONFIG = (ROOT / "protos" / "service_config.json").read_text()
MIB = 2**20

Stub = seniority_pb2_grpc.SeniorityModelStub


@contextmanager
def plain_client(
    *targets: str, buffer_bytes: int | None = None
) -> Iterator[seniority_pb2_grpc.SeniorityModelStub]:
    """What the docs tell another team to write."""
    options = [("grpc.service_config", CONFIG), ("grpc.use_local_subchannel_pool", 1)]
    if buffer_bytes:
        options.append(("grpc.per_rpc_retry_buffer_size", buffer_bytes))
    with grpc.insecure_channel(f"ipv4:{','.join(targets)}", options=options) as channel:
        yield Stub(channel)


def ask(stub: Stub, pairs: Pairs, *, seconds: float = 60) -> Sequence[int]:
    """One RPC; what it raises is the test's failure."""
    batch = [pb.SeniorityRequest(uuid=1, company=company, title=title) for company, title in pairs]
    response = stub.InferSeniority(pb.SeniorityRequestBatch(batch=batch), timeout=seconds)
    return [answer.seniority for answer in response.batch]


def levels(pairs: Pairs) -> list[int]:
    """What the model answers."""
    return [scripted_level(*pair) for pair in pairs]


def requests(stage: ProxyEnvironment, code: str) -> float:
    """How many requests the proxy ended so."""
    return read_metrics(stage.proxy.http_url).get(("cache_proxy_requests_total", code), 0)


@pytest.mark.parametrize("size", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_full_queue_is_come_back_to(stage_with: StartProxyEnvironment, size: int) -> None:
    """Refused while another's pairs fill the queue, answered when it has room; also when the request is
    larger than the 256 KiB that gRPC keeps for retries unless told otherwise.
    """  # noqa: D205 - one thought
    stage = stage_with("--max-queued-pairs", str(size), *UNLIMITED_RATE_FLAGS)
    room = threading.Event()

    def full(call: ReceivedCall) -> Answers:
        room.wait(30)
        return answer_all(call)

    stage.model.behaviour = full
    first, second = make_pairs("first" + "x" * 40, size), make_pairs("second" + "x" * 40, size)
    waiting = stage.caller.start_infer(first)
    wait_for(lambda: len(stage.model.received_pairs()) == size, description="they wait for the model")
    with plain_client(stage.proxy.target, buffer_bytes=4 * MIB) as stub, ThreadPoolExecutor(1) as aside:
        asked = aside.submit(ask, stub, second)
        wait_for(lambda: requests(stage, "RESOURCE_EXHAUSTED"), description="it is refused")
        room.set()
        assert asked.result() == levels(second)
    assert waiting.result().code is grpc.StatusCode.OK


@pytest.mark.slow
def test_a_model_that_is_down_for_a_while_is_come_back_to(stage_with: StartProxyEnvironment) -> None:
    """The proxy says UNAVAILABLE after its own retries; the client's bring the answer with the model back."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--model-retry-window", "1s")
    back = threading.Event()

    def down(call: ReceivedCall) -> Answers:
        if not back.is_set():
            raise AbortCallError(grpc.StatusCode.UNAVAILABLE)
        return answer_all(call)

    stage.model.behaviour = down
    pairs = make_pairs("outage", 20)
    with plain_client(stage.proxy.target) as stub, ThreadPoolExecutor(1) as aside:
        asked = aside.submit(ask, stub, pairs)
        wait_for(lambda: requests(stage, "UNAVAILABLE"), description="it is refused")
        back.set()
        assert asked.result() == levels(pairs)


def test_an_rpc_that_a_replica_cancels_is_repeated() -> None:
    """A server that ends closes connections, and gRPC may call that CANCELLED."""

    def once(call: ReceivedCall) -> Answers:
        if call.number == 0:
            raise AbortCallError(grpc.StatusCode.CANCELLED)
        return answer_all(call)

    pairs = make_pairs("cancelled", 3)
    with scripted_model(once) as replica, plain_client(replica.target) as stub:
        assert sorted(ask(stub, pairs)) == sorted(levels(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_replica_that_ends_costs_no_rpc(shared_redis: str, number: signal.Signals) -> None:
    """Two of them, one drained or killed under load: every RPC is answered."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"ends{number}", *UNLIMITED_RATE_FLAGS)
    stop, failed, answered = threading.Event(), [], [0]
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, *flags) as going,
        cache_proxy("--model-target", model.target, *flags) as staying,
        plain_client(going.target, staying.target) as stub,
    ):

        def load(name: str) -> None:
            count = 0
            while not stop.is_set():
                pairs = make_pairs(f"{name} {(count := count + 1)}", 3)
                try:
                    assert ask(stub, pairs) == levels(pairs)
                    answered[0] += 1
                except grpc.RpcError as error:
                    failed.append(error)

        threads = [threading.Thread(target=load, args=(f"load {one}",)) for one in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: answered[0] > 50, description="both answer")
        going.stop(number)
        before = answered[0]
        wait_for(lambda: answered[0] > before + 50 or failed, description="the other answers")
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failed
