"""A model at the wire whose behaviour is the test's: a function from a call to its answer."""

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

Trailers = tuple[tuple[str, str | bytes], ...]
_MAX_CALLS = 64


@dataclass(frozen=True)
class ReceivedCall:
    """A call as it arrived: `at` is monotonic, `number` counts from 0."""

    number: int
    monotonic_seconds: float
    ids: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    message_bytes: int
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    certificate: str = ""  # the caller's common name
    authorization: str = ""


class AbortCallError(Exception):
    """Raised by a behaviour: end the call with this status."""

    def __init__(self, code: grpc.StatusCode, message: str = "scripted", trailers: Trailers = ()) -> None:
        super().__init__(code, message)
        self.code, self.message, self.trailers = code, message, trailers


Answers = Sequence[tuple[int, int]]
Behaviour = Callable[[ReceivedCall], Answers]


def scripted_level(company: str, title: str) -> int:
    """What a well-behaved `ScriptedModel` answers: 1 to 7, by the pair's exact spelling."""
    return sum(f"{len(company)}:{company}{title}".encode()) % 7 + 1


def answer_all(call: ReceivedCall) -> Answers:
    """Answer everything, last first."""
    answers = zip(call.ids, call.pairs, strict=True)
    return [(uuid, scripted_level(*pair)) for uuid, pair in reversed(list(answers))]


@dataclass
class ScriptedModel(seniority_pb2_grpc.SeniorityModelServicer):
    """State: `calls`, appended to under `_lock` by the server's threads before the behaviour runs."""

    behaviour: Behaviour = answer_all
    target: str = ""
    calls: list[ReceivedCall] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def InferSeniority(  # noqa: N802 - the contract's name
        self, request: pb.SeniorityRequestBatch, context: grpc.ServicerContext
    ) -> pb.SeniorityResponseBatch:
        """Record the call, then behave."""
        at = time.monotonic()
        with self._lock:
            call = ReceivedCall(
                number=len(self.calls),
                monotonic_seconds=at,
                ids=tuple(item.uuid for item in request.batch),
                pairs=tuple((item.company, item.title) for item in request.batch),
                message_bytes=request.ByteSize(),
                metadata=dict(context.invocation_metadata()),
                certificate=_common_name(context),
                authorization=str(dict(context.invocation_metadata()).get("authorization", "")),
            )
            self.calls.append(call)
        try:
            answers = self.behaviour(call)
        except AbortCallError as abort:
            context.set_trailing_metadata(abort.trailers)
            context.abort(abort.code, abort.message)
        return pb.SeniorityResponseBatch(
            batch=[pb.SeniorityResponse(uuid=uuid, seniority=level) for uuid, level in answers]
        )

    def received_pairs(self, prefix: str = "") -> list[tuple[str, str]]:
        """Every pair it was asked for, in order, repeats too, whose company begins so."""
        with self._lock:
            return [pair for call in self.calls for pair in call.pairs if pair[0].startswith(prefix)]

    def calls_with(self, prefix: str) -> list[ReceivedCall]:
        """The calls that held such a pair."""
        with self._lock:
            return [call for call in self.calls if any(pair[0].startswith(prefix) for pair in call.pairs)]


def _common_name(context: grpc.ServicerContext) -> str:
    """Of the caller's certificate, empty without one."""
    peer: Any = context.auth_context()
    return b"".join(peer.get("x509_common_name", ())).decode()


@contextmanager
def scripted_model(
    behaviour: Behaviour = answer_all,
    *,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[ScriptedModel]:
    """The model on a free port, in threads of its own; without credentials, in the clear."""
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


def bad_request_details(*violations: tuple[str, str]) -> Trailers:
    """Status details that name fields and say why."""
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
