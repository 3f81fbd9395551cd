"""One call to the model: own ids out, strictly joined levels back."""

import asyncio
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from protos import seniority_pb2
from services.cache_proxy.auth.model_credentials import PLAINTEXT, ModelCredentials
from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import (
    BatchRejectedError,
    CallFailedError,
    InvalidModelResponseError,
    PairRejectedError,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.grpc_details import format_status, is_connection_failure
from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.reloading_channel import ReloadingChannel
from services.common.tracing import OFF, Tracing

PAIR_REJECTED_MESSAGE = "the model refused the pair"
REJECTION_CODES = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
)
_SERVICE = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"]
_METHOD = f"/{_SERVICE.full_name}/InferSeniority"
_MAX_RESPONSE_BYTES = 16 * 2**20
_MAX_METADATA_BYTES = 2**20  # a refusal with a long message is still a refusal, not a broken stream
_MAX_PUSHBACK_SECONDS = 3600.0  # the queue believes no moment further off
_MAX_PUSHBACK_DIGITS = 15
_MAX_ID = 2**31 - 1
_PAIR_INDEX_PATTERN = re.compile(r"batch\[(\d{1,6})\](\.company|\.title)?", re.ASCII)
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.enable_retries", 0),  # retries are the queue's, within the slots
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 10_000),  # also for bytes that nobody acknowledges: the machine is gone
]


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes to the model: an id of our own for each pair, and the message."""

    ids: Sequence[int]
    request: seniority_pb2.SeniorityRequestBatch


_InferMethod = aio.UnaryUnaryMultiCallable[
    seniority_pb2.SeniorityRequestBatch, seniority_pb2.SeniorityResponseBatch | None
]
LevelsTask = asyncio.Task[list[int | InvalidModelResponseError]]


class ModelClient:
    """Speaks to the model at `target`. An id is never used twice in a row, so a mix-up shows as one."""

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
        self._channel.current.get_state(try_to_connect=True)  # a handshake would make the first call late
        self._ids = itertools.cycle(range(1, _MAX_ID))

    def reload(self) -> None:
        """Look at the target, the certificates and the token, and go by them from the next call on."""
        self._channel.refresh()
        if self._token is not None:
            self._token.file.reload_if_changed()

    def prepare(self, pairs: Sequence[Pair]) -> Batch:
        """A batch ready to go: what takes time is done before its slot begins."""
        ids = list(itertools.islice(self._ids, len(pairs)))
        request = seniority_pb2.SeniorityRequestBatch(
            batch=[
                seniority_pb2.SeniorityRequest(uuid=uuid, company=pair.company, title=pair.title)
                for uuid, pair in zip(ids, pairs, strict=True)
            ]
        )
        return Batch(ids, request)

    async def send(self, batch: Batch) -> LevelsTask:
        """Return as soon as gRPC has it: what is returned becomes the answer, a level or nonsense for each
        pair by position, or raises `BatchRejectedError` or `CallFailedError`.
        """  # noqa: D205 - one thought
        self._metrics.model_pairs.inc(len(batch.ids))
        self._metrics.model_batch_pairs.observe(len(batch.ids))
        answering = asyncio.create_task(self._call_model(batch))
        for _ in range(2):  # the call's own task hands it over, in the turn after the one that makes it
            await asyncio.sleep(0)
        return answering

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
        """As the generated stub, but for answers that cannot be read: gRPC would log a traceback."""
        return self._channel.current.unary_unary(
            _METHOD,
            request_serializer=seniority_pb2.SeniorityRequestBatch.SerializeToString,
            response_deserializer=_parse_response,
        )

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def _translate_error(self, error: aio.AioRpcError, pairs: int) -> BatchRejectedError | CallFailedError:
        code, message = error.code(), error.details() or ""
        trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
        if code in REJECTION_CODES:
            return BatchRejectedError(code, message, rejected_pairs(trailers, code, message, pairs))
        return CallFailedError(
            code,
            f"the model at {self._target}: {code.name}: {message}",
            _pushback_seconds(trailers),
            safe_message=f"the model at {self._target}: {format_status(code.name, message)}",
            unsent=code is grpc.StatusCode.UNAVAILABLE and is_connection_failure(message),
        )


def open_model_channel(
    target: str, *, credentials: ModelCredentials = PLAINTEXT, max_call_seconds: float = 0
) -> ReloadingChannel:
    """Return a channel to the model. It connects when it is first used, and again whenever that is needed."""
    return ReloadingChannel(
        target, tls=credentials.tls, options=_CHANNEL_OPTIONS, max_call_seconds=max_call_seconds
    )


def _parse_response(message: bytes) -> seniority_pb2.SeniorityResponseBatch | None:
    try:
        return seniority_pb2.SeniorityResponseBatch.FromString(message)
    except DecodeError:
        return None


def join_levels(
    ids: Sequence[int], response: seniority_pb2.SeniorityResponseBatch
) -> list[int | InvalidModelResponseError]:
    """The response's levels in the order of `ids`; an answer to another id answers nobody."""
    answers: dict[int, int] = {}
    contradicted: set[int] = set()
    for answer in response.batch:
        if answers.setdefault(answer.uuid, answer.seniority) != answer.seniority:
            contradicted.add(answer.uuid)
    joined: list[int | InvalidModelResponseError] = []
    for uuid in ids:
        level = answers.get(uuid)
        if level is None:
            joined.append(InvalidModelResponseError("the model did not answer for it"))
        elif uuid in contradicted:
            joined.append(InvalidModelResponseError("the model answered twice, differently"))
        elif not MIN_LEVEL <= level <= MAX_LEVEL:
            joined.append(
                InvalidModelResponseError(
                    f"the model answered level {level}, outside {MIN_LEVEL} to {MAX_LEVEL}"
                )
            )
        else:
            joined.append(level)
    return joined


def rejected_pairs(
    trailers: Mapping[str, Any], code: grpc.StatusCode, message: str, pairs: int
) -> dict[int, PairRejectedError]:
    """Return the pairs that a refusal names by index, in `google.rpc.BadRequest` details or in its message.

    What the model says of one pair is that pair's reason. What it says of several may quote each of them.
    """
    named: dict[int, PairRejectedError] = {}
    for field, description in _field_violations(trailers):
        found = _PAIR_INDEX_PATTERN.fullmatch(field)
        if found and int(found[1]) < pairs:
            reason = "" if pairs > 1 and message and message in description else description
            named[int(found[1])] = PairRejectedError(
                code, reason or PAIR_REJECTED_MESSAGE, found[2] or "", reason
            )
    if not named:
        found = _PAIR_INDEX_PATTERN.match(message)  # only in front: behind it could be a pair's own text
        if found and int(found[1]) < pairs:
            names_one = len({index for index, _ in _PAIR_INDEX_PATTERN.findall(message)}) == 1
            reason = message if names_one else ""
            named[int(found[1])] = PairRejectedError(
                code, reason or PAIR_REJECTED_MESSAGE, found[2] or "", reason
            )
    return named


def _field_violations(trailers: Mapping[str, Any]) -> list[tuple[str, str]]:
    details = trailers.get("grpc-status-details-bin")
    if not isinstance(details, bytes):
        return []
    try:
        status = status_pb2.Status.FromString(details)
        bad_request = error_details_pb2.BadRequest()
        return [
            (violation.field, violation.description)
            for detail in status.details
            if detail.Unpack(bad_request)
            for violation in bad_request.field_violations
        ]
    except DecodeError:  # details are a hint; without them the pair is looked for
        return []


def _pushback_seconds(trailers: Mapping[str, Any]) -> float | None:
    text = str(trailers.get("grpc-retry-pushback-ms", ""))
    if not text.isdecimal() or len(text) > _MAX_PUSHBACK_DIGITS:
        return None
    return min(int(text) / 1000, _MAX_PUSHBACK_SECONDS)
