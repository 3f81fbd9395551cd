"""The client of the model: one call for each batch, with ids that the proxy assigns."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from protos import seniority_pb2
from services.cache_proxy.auth.model_credentials import PLAINTEXT, ModelCredentials
from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import BatchRejectedError, CallFailedError, InvalidModelResponseError
from services.cache_proxy.model.responses import (
    REJECTION_CODES,
    join_levels,
    parse_response,
    pushback_seconds,
    rejected_pairs,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.grpc_details import format_status, is_connection_failure
from services.common.reloading_channel import ReloadingChannel
from services.common.tracing import OFF, Tracing

_SERVICE = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"]
_METHOD = f"/{_SERVICE.full_name}/InferSeniority"
_MAX_RESPONSE_BYTES = 16 * 2**20
# A rejection with a long message must arrive as a rejection, not as a broken stream.
_MAX_METADATA_BYTES = 2**20
_MAX_ID = 2**31 - 1
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
    # The queue retries, within the rate limit.
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 300_000),
    # This timeout also covers sent bytes that are not acknowledged, as when the machine has vanished.
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class Batch:
    """A request to the model that is ready to be sent: an id for each pair, and the message."""

    ids: Sequence[int]
    request: seniority_pb2.SeniorityRequestBatch


_InferMethod = aio.UnaryUnaryMultiCallable[
    seniority_pb2.SeniorityRequestBatch, seniority_pb2.SeniorityResponseBatch | None
]
LevelsTask = asyncio.Task[list[int | InvalidModelResponseError]]


class ModelClient:
    """Sends batches to the model at `target`.

    Ids count up over all batches, so that levels which the model mixes up between calls are noticed.
    """

    def __init__(
        self,
        target: str,
        *,
        deadline_seconds: float,
        metrics: ProxyMetrics,
        credentials: ModelCredentials = PLAINTEXT,
        tracing: Tracing = OFF,
    ) -> None:
        self._target = target
        self._deadline_seconds = deadline_seconds
        self._metrics = metrics
        self._tracing = tracing
        self._token = credentials.token
        self._channel = open_model_channel(target, credentials=credentials, max_call_seconds=deadline_seconds)
        # Connect now: a TLS handshake would delay the first call beyond its slot.
        self._channel.current.get_state(try_to_connect=True)
        self._ids = itertools.cycle(range(1, _MAX_ID))

    def reload(self) -> None:
        """Reload the address of the target, the certificates and the token for the calls from now on."""
        self._channel.refresh()
        if self._token is not None:
            self._token.file.reload_if_changed()

    def prepare(self, pairs: Sequence[Pair]) -> Batch:
        """Build the request for some pairs. This takes time, so it is done before the batch's slot begins."""
        ids = list(itertools.islice(self._ids, len(pairs)))
        request = seniority_pb2.SeniorityRequestBatch(
            batch=[
                seniority_pb2.SeniorityRequest(uuid=uuid, company=pair.company, title=pair.title)
                for uuid, pair in zip(ids, pairs, strict=True)
            ]
        )
        return Batch(ids, request)

    async def send(self, batch: Batch) -> LevelsTask:
        """Send a batch, and return as soon as gRPC has it.

        The returned task gives a level or an error for each pair by position, or raises `BatchRejectedError`
        or `CallFailedError`.
        """
        self._metrics.model_pairs.inc(len(batch.ids))
        self._metrics.model_batch_pairs.observe(len(batch.ids))
        task = asyncio.create_task(self._call_model(batch))
        await _yield_until_written()
        return task

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def _call_model(self, batch: Batch) -> list[int | InvalidModelResponseError]:
        code = grpc.StatusCode.CANCELLED
        with self._tracing.client_span("InferSeniority", pairs=len(batch.ids)) as span:
            token = () if self._token is None else (self._token.metadata(),)
            try:
                with self._metrics.model_duration.time():
                    response = await self._infer_method()(
                        batch.request,
                        timeout=self._deadline_seconds,
                        metadata=(*token, *self._tracing.headers()),
                    )
                code = grpc.StatusCode.OK if response is not None else grpc.StatusCode.INTERNAL
            except aio.AioRpcError as error:
                code = error.code()
                raise self._translate_error(error, len(batch.ids)) from error
            finally:
                span.set_status(code.name)
                self._metrics.model_calls.labels(code.name).inc()
        if response is None:
            message = f"the model at {self._target}: its answer is not a SeniorityResponseBatch"
            raise CallFailedError(code, message, None, safe_message=message)
        return join_levels(batch.ids, response)

    def _infer_method(self) -> _InferMethod:
        """Return the RPC method on the current channel.

        It differs from the generated stub for responses that cannot be parsed: `parse_response` returns None
        for them, where gRPC would log a traceback.
        """
        return self._channel.current.unary_unary(
            _METHOD,
            request_serializer=seniority_pb2.SeniorityRequestBatch.SerializeToString,
            response_deserializer=parse_response,
        )

    def _translate_error(self, error: aio.AioRpcError, pairs: int) -> BatchRejectedError | CallFailedError:
        code = error.code()
        message = error.details() or ""
        trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
        if code in REJECTION_CODES:
            return BatchRejectedError(code, message, rejected_pairs(trailers, code, message, pairs))
        return CallFailedError(
            code,
            f"the model at {self._target}: {code.name}: {message}",
            pushback_seconds(trailers),
            safe_message=f"the model at {self._target}: {format_status(code.name, message)}",
            unsent=code is grpc.StatusCode.UNAVAILABLE and is_connection_failure(message),
        )


async def _yield_until_written() -> None:
    """Let the event loop run until a call that was just started has been handed to gRPC.

    The task of the call starts in the next iteration of the loop, and grpc.aio hands the request over from a
    task of its own in the iteration after that.
    """
    for _ in range(2):
        await asyncio.sleep(0)


def open_model_channel(
    target: str, *, credentials: ModelCredentials = PLAINTEXT, max_call_seconds: float = 0
) -> ReloadingChannel:
    """Return a channel to the model. It connects on first use, and again whenever that is needed."""
    return ReloadingChannel(
        target, tls=credentials.tls, options=_CHANNEL_OPTIONS, max_call_seconds=max_call_seconds
    )
