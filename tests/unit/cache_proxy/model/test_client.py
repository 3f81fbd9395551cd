"""The model client with responses and pushbacks that are not valid."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from prometheus_client import CollectorRegistry

from services.cache_proxy.errors import CallFailedError
from services.cache_proxy.model.client import ModelClient
from services.cache_proxy.observability.metrics import ProxyMetrics
from tests.support.model_server import AbortCallError, Answers, ReceivedCall, scripted_model
from tests.support.replicas import numbered_pairs


@contextmanager
def _server_with_response(answer: bytes) -> Iterator[str]:
    """Run a model server that returns the same bytes to every call."""
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: answer
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("SeniorityModel", {"InferSeniority": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@pytest.mark.parametrize("answer", [b"\xff\xff\xff\xff", b"\x0a\x05hello"])
async def test_unparsable_response_fails_call_without_traceback(
    answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The pairs are retried as after any fault of the model, and no traceback is logged."""
    with _server_with_response(answer) as target:
        model = ModelClient(target, deadline_seconds=5, metrics=ProxyMetrics(CollectorRegistry()))
        task = await model.send(model.prepare(numbered_pairs([1, 2])))
        with pytest.raises(CallFailedError) as failed:
            await task
        await model.close()
    assert failed.value.code is grpc.StatusCode.INTERNAL
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("pushback", "expected_seconds"),
    [("1500", 1.5), ("9000000", 3600.0), ("-1", None), ("x", None), ("9" * 5000, None)],
)
async def test_pushback_is_limited_to_one_hour_and_ignored_if_invalid(
    pushback: str, expected_seconds: float | None
) -> None:
    """The queue ignores later moments, and text that is no number of milliseconds counts as no pushback."""

    def busy(_call: ReceivedCall) -> Answers:
        raise AbortCallError(grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", pushback),))

    with scripted_model(busy) as server:
        model = ModelClient(server.target, deadline_seconds=5, metrics=ProxyMetrics(CollectorRegistry()))
        with pytest.raises(CallFailedError) as failed:
            await (await model.send(model.prepare(numbered_pairs([1]))))
        await model.close()
    assert failed.value.retry_after_seconds == expected_seconds
