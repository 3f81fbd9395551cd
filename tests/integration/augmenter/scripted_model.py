"""A model at the wire that does what a test tells it, call by call."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2, status_pb2

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc

Trailers = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, kw_only=True)
class Fail:
    """End the call with a status."""

    code: grpc.StatusCode
    details: str = "scripted"
    trailers: Trailers = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer with what `make` makes of the request."""

    make: Callable[[pb.SeniorityRequestBatch], list[tuple[int, int]]]
    trailers: Trailers = ()


Step = Fail | Answer


def all_threes(request: pb.SeniorityRequestBatch) -> list[tuple[int, int]]:
    """Level 3 for each, last first."""
    return [(item.uuid, 3) for item in reversed(request.batch)]


@dataclass
class ScriptedModel(seniority_pb2_grpc.SeniorityModelServicer):
    """Takes a step a call, and level 3 for everything once they are used up."""

    steps: list[Step]
    target: str = ""
    token: str | None = None  # demanded of every call
    calls: list[list[str]] = field(default_factory=list)  # the companies of each
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)

    def InferSeniority(  # noqa: N802 - the contract's name
        self, request: pb.SeniorityRequestBatch, context: grpc.ServicerContext
    ) -> pb.SeniorityResponseBatch:
        """Do the next step."""
        if self.token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who is that?")
        self.calls.append([item.company for item in request.batch])
        self.metadata.append(dict(context.invocation_metadata()))
        step = self.steps.pop(0) if self.steps else Answer(make=all_threes)
        context.set_trailing_metadata(tuple(step.trailers))
        if isinstance(step, Fail):
            context.abort(step.code, step.details)
        answers = [pb.SeniorityResponse(uuid=uuid, seniority=level) for uuid, level in step.make(request)]
        return pb.SeniorityResponseBatch(batch=answers)


@contextmanager
def scripted_model(
    *steps: Step, credentials: grpc.ServerCredentials | None = None
) -> Iterator[ScriptedModel]:
    """The model on a free port, in threads of its own; without credentials, in the clear."""
    model = ScriptedModel(list(steps))
    server = grpc.server(ThreadPoolExecutor(4))
    seniority_pb2_grpc.add_SeniorityModelServicer_to_server(model, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    model.target = f"127.0.0.1:{port}"
    server.start()
    try:
        yield model
    finally:
        server.stop(grace=None).wait()


def name_fields(*violations: tuple[str, str]) -> Trailers:
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
