"""A scripted model server: a function of the test computes the response to each call."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc

Trailers = Sequence[tuple[str, str | bytes]]
_MAX_CALLS = 64


@dataclass(frozen=True)
class ReceivedCall:
    """A call as it arrived.

    `number` counts from 0. `monotonic_seconds` is the time of arrival on `time.monotonic`. `certificate` is
    the common name of the caller's certificate, empty without one.
    """

    number: int
    monotonic_seconds: float
    ids: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    message_bytes: int
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    certificate: str = ""
    authorization: str = ""

    @property
    def companies(self) -> list[str]:
        """Return the companies of the pairs, in their order."""
        return [company for company, _ in self.pairs]


class AbortCallError(Exception):
    """End the call with this status. A behaviour raises it."""

    def __init__(self, code: grpc.StatusCode, message: str = "scripted", trailers: Trailers = ()) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.trailers = trailers


Answers = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Response:
    """A successful response with trailers."""

    answers: Answers
    trailers: Trailers = ()


Behaviour = Callable[[ReceivedCall], Answers | Response]
"""Computes the (id, level) of each answer; or raises `AbortCallError`."""


def scripted_level(company: str, title: str) -> int:
    """Return the level, 1 to 7, that `answer_all` gives: a function of the pair's exact spelling."""
    return sum(f"{len(company)}:{company}{title}".encode()) % 7 + 1


def answer_all(call: ReceivedCall) -> Answers:
    """Answer every pair with its scripted level, the last pair first."""
    answers = zip(call.ids, call.pairs, strict=True)
    return [(uuid, scripted_level(*pair)) for uuid, pair in reversed(list(answers))]


def answer_threes(call: ReceivedCall) -> list[tuple[int, int]]:
    """Answer every pair with level 3, the last pair first."""
    return [(uuid, 3) for uuid in reversed(call.ids)]


@dataclass(frozen=True)
class AbortWith:
    """A behaviour that ends each call with this status."""

    code: grpc.StatusCode
    message: str = "scripted"
    trailers: Trailers = ()

    def __call__(self, call: ReceivedCall) -> Answers:
        """Raise `AbortCallError`."""
        raise AbortCallError(self.code, self.message, self.trailers)


def in_sequence(*steps: Behaviour) -> Behaviour:
    """Return a behaviour that uses one step a call, in their order, and `answer_threes` after the last."""
    remaining = list(steps)

    def behave(call: ReceivedCall) -> Answers | Response:
        step = remaining.pop(0) if remaining else answer_threes
        return step(call)

    return behave


@dataclass
class ScriptedModel(seniority_pb2_grpc.SeniorityModelServicer):
    """A model whose behaviour the test sets.

    State: `calls`, appended to by the server's threads before the behaviour runs and guarded by `_lock`.
    `required_token`: a call without this bearer token is rejected as UNAUTHENTICATED and not recorded.
    """

    behaviour: Behaviour = answer_all
    target: str = ""
    required_token: str | None = None
    calls: list[ReceivedCall] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def InferSeniority(  # noqa: N802 - the contract's name
        self, request: pb.SeniorityRequestBatch, context: grpc.ServicerContext
    ) -> pb.SeniorityResponseBatch:
        """Record the call and respond as the behaviour says."""
        arrived_at = time.monotonic()
        metadata = dict(context.invocation_metadata())
        authorization = str(metadata.get("authorization", ""))
        if self.required_token is not None and authorization != f"Bearer {self.required_token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        with self._lock:
            call = ReceivedCall(
                number=len(self.calls),
                monotonic_seconds=arrived_at,
                ids=tuple(item.uuid for item in request.batch),
                pairs=tuple((item.company, item.title) for item in request.batch),
                message_bytes=request.ByteSize(),
                metadata=metadata,
                certificate=_common_name(context),
                authorization=authorization,
            )
            self.calls.append(call)
        try:
            response = self.behaviour(call)
        except AbortCallError as error:
            context.set_trailing_metadata(tuple(error.trailers))
            context.abort(error.code, error.message)
        if not isinstance(response, Response):
            response = Response(response)
        if response.trailers:
            context.set_trailing_metadata(tuple(response.trailers))
        return pb.SeniorityResponseBatch(
            batch=[pb.SeniorityResponse(uuid=uuid, seniority=level) for uuid, level in response.answers]
        )

    def received_pairs(self, company_prefix: str = "") -> list[tuple[str, str]]:
        """Return every received pair whose company starts with the prefix, in order, repetitions included."""
        with self._lock:
            return [pair for call in self.calls for pair in call.pairs if pair[0].startswith(company_prefix)]

    def calls_with(self, company_prefix: str) -> list[ReceivedCall]:
        """Return the calls that contained such a pair."""
        with self._lock:
            return [
                call for call in self.calls if any(pair[0].startswith(company_prefix) for pair in call.pairs)
            ]


def _common_name(context: grpc.ServicerContext) -> str:
    """Return the common name of the caller's certificate, or an empty string."""
    peer: Any = context.auth_context()
    return b"".join(peer.get("x509_common_name", ())).decode()


@contextmanager
def scripted_model(
    behaviour: Behaviour = answer_all,
    *,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[ScriptedModel]:
    """Run a scripted model on a free port in threads; without credentials it uses no TLS."""
    model = ScriptedModel(behaviour)
    pool = ThreadPoolExecutor(_MAX_CALLS)
    server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
    seniority_pb2_grpc.add_SeniorityModelServicer_to_server(model, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    model.target = f"{address.rpartition(':')[0]}:{port}"
    server.start()
    try:
        yield model
    finally:
        server.stop(grace=None).wait()
        pool.shutdown(wait=False, cancel_futures=True)


def bad_request_details(*violations: tuple[str, str]) -> tuple[tuple[str, bytes], ...]:
    """Return the trailer with status details that name fields, each with a description."""
    status = status_pb2.Status(code=3, message="refused")
    status.details.add().Pack(
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=name, description=reason)
                for name, reason in violations
            ]
        )
    )
    return (("grpc-status-details-bin", status.SerializeToString()),)
