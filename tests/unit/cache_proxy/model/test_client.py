"""The call to the model, where what comes back is not even a message."""

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
def _model_that_answers(answer: bytes) -> Iterator[str]:
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
async def test_an_answer_that_is_no_message_is_a_failed_call(
    answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again as any breakdown of the model's, and no traceback tells of it."""
    with _model_that_answers(answer) as target:
        model = ModelClient(target, deadline_seconds=5, metrics=ProxyMetrics(CollectorRegistry()))
        answering = await model.send(model.prepare(numbered_pairs([1, 2])))
        with pytest.raises(CallFailedError) as failed:
            await answering
        await model.close()
    assert failed.value.code is grpc.StatusCode.INTERNAL
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("told", "meant"), [("1500", 1.5), ("9000000", 3600.0), ("-1", None), ("x", None), ("9" * 5000, None)]
)
async def test_a_pushback_is_at_most_an_hour(told: str, meant: float | None) -> None:
    """The queue believes no moment further off; what is no number of milliseconds says nothing."""

    def busy(_call: ReceivedCall) -> Answers:
        raise AbortCallError(grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", told),))

    with scripted_model(busy) as server:
        model = ModelClient(server.target, deadline_seconds=5, metrics=ProxyMetrics(CollectorRegistry()))
        with pytest.raises(CallFailedError) as failed:
            await (await model.send(model.prepare(numbered_pairs([1]))))
        await model.close()
    assert failed.value.retry_after_seconds == meant
