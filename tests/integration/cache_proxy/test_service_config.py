"""A plain gRPC client with `protos/service_config.json` recovers from full queues, outages and restarts."""

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
    """Yield a stub as the docs recommend it to other teams."""
    options = [("grpc.service_config", CONFIG), ("grpc.use_local_subchannel_pool", 1)]
    if buffer_bytes:
        options.append(("grpc.per_rpc_retry_buffer_size", buffer_bytes))
    with grpc.insecure_channel(f"ipv4:{','.join(targets)}", options=options) as channel:
        yield Stub(channel)


def infer(stub: Stub, pairs: Pairs, *, seconds: float = 60) -> Sequence[int]:
    """Send one RPC and return the levels. Raise grpc.RpcError if it fails."""
    batch = [pb.SeniorityRequest(uuid=1, company=company, title=title) for company, title in pairs]
    response = stub.InferSeniority(pb.SeniorityRequestBatch(batch=batch), timeout=seconds)
    return [answer.seniority for answer in response.batch]


def levels(pairs: Pairs) -> list[int]:
    """Return the levels that the model gives these pairs."""
    return [scripted_level(*pair) for pair in pairs]


def count_requests(stage: ProxyEnvironment, code: str) -> float:
    """Return how many requests the proxy ended with this code."""
    return read_metrics(stage.proxy.http_url).get(("cache_proxy_requests_total", code), 0)


@pytest.mark.parametrize("size", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_request_rejected_by_a_full_queue_is_retried_until_answered(
    stage_with: StartProxyEnvironment, size: int
) -> None:
    """It is rejected while another caller's pairs fill the queue, and answered once there is space.

    This also holds for a request over 256 KiB, the default limit of what gRPC buffers for retries.
    """
    stage = stage_with("--max-queued-pairs", str(size), *UNLIMITED_RATE_FLAGS)
    space_freed = threading.Event()

    def block_until_freed(call: ReceivedCall) -> Answers:
        space_freed.wait(30)
        return answer_all(call)

    stage.model.behaviour = block_until_freed
    first, second = make_pairs("first" + "x" * 40, size), make_pairs("second" + "x" * 40, size)
    waiting = stage.caller.start_infer(first)
    wait_for(lambda: len(stage.model.received_pairs()) == size, description="they wait for the model")
    with plain_client(stage.proxy.target, buffer_bytes=4 * MIB) as stub, ThreadPoolExecutor(1) as executor:
        future = executor.submit(infer, stub, second)
        wait_for(lambda: count_requests(stage, "RESOURCE_EXHAUSTED"), description="it is refused")
        space_freed.set()
        assert future.result() == levels(second)
    assert waiting.result().code is grpc.StatusCode.OK


@pytest.mark.slow
def test_request_during_a_model_outage_is_retried_until_answered(stage_with: StartProxyEnvironment) -> None:
    """The proxy returns UNAVAILABLE after its retries, and the client's retries succeed after the outage."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--model-retry-window", "1s")
    model_recovered = threading.Event()

    def fail_until_recovered(call: ReceivedCall) -> Answers:
        if not model_recovered.is_set():
            raise AbortCallError(grpc.StatusCode.UNAVAILABLE)
        return answer_all(call)

    stage.model.behaviour = fail_until_recovered
    pairs = make_pairs("outage", 20)
    with plain_client(stage.proxy.target) as stub, ThreadPoolExecutor(1) as executor:
        future = executor.submit(infer, stub, pairs)
        wait_for(lambda: count_requests(stage, "UNAVAILABLE"), description="it is refused")
        model_recovered.set()
        assert future.result() == levels(pairs)


def test_rpc_cancelled_by_a_replica_is_retried() -> None:
    """GRPC may report CANCELLED when a server ends and closes its connections."""

    def cancel_first_call(call: ReceivedCall) -> Answers:
        if call.number == 0:
            raise AbortCallError(grpc.StatusCode.CANCELLED)
        return answer_all(call)

    pairs = make_pairs("cancelled", 3)
    with scripted_model(cancel_first_call) as replica, plain_client(replica.target) as stub:
        assert sorted(infer(stub, pairs)) == sorted(levels(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_drained_or_killed_replica_fails_no_rpc(shared_redis: str, number: signal.Signals) -> None:
    """With two replicas, one of which is drained or killed under load, every RPC is answered."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"ends{number}", *UNLIMITED_RATE_FLAGS)
    stop, failed, answered = threading.Event(), [], [0]
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, *flags) as ending_replica,
        cache_proxy("--model-target", model.target, *flags) as other_replica,
        plain_client(ending_replica.target, other_replica.target) as stub,
    ):

        def load(name: str) -> None:
            count = 0
            while not stop.is_set():
                pairs = make_pairs(f"{name} {(count := count + 1)}", 3)
                try:
                    assert infer(stub, pairs) == levels(pairs)
                    answered[0] += 1
                except grpc.RpcError as error:
                    failed.append(error)

        threads = [threading.Thread(target=load, args=(f"load {one}",)) for one in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: answered[0] > 50, description="both answer")
        ending_replica.stop(number)
        before = answered[0]
        wait_for(lambda: answered[0] > before + 50 or failed, description="the other answers")
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failed
