"""The RPC: from the wire to the resolver and back, each pair counted once."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from protos import seniority_pb2
from services.cache_proxy.callers import ANONYMOUS, Caller, Identify
from services.cache_proxy.errors import Draining, InvalidRequest, ProxyError
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.queue import Asker
from services.cache_proxy.resolver import Answers, Resolver
from services.cache_proxy.rpc_metrics import outcome_kind
from services.cache_proxy.statuses import Status, status_of
from services.cache_proxy.wire import holds_more_than

SERVICE_NAME = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name

_LEAST_PAIR_BYTES = 2
_log = logging.getLogger(__name__)

Context = aio.ServicerContext[seniority_pb2.SeniorityRequestBatch, seniority_pb2.SeniorityResponseBatch]


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may hold, and how long a caller without a deadline waits."""

    max_pairs: int
    max_field_bytes: int
    max_wait_seconds: float


class SeniorityService:
    """Answers as the model would. The only place where errors become statuses.

    State: `_in_flight`, and `_idle`, set while it is 0.
    """

    def __init__(
        self, *, resolver: Resolver, identify: Identify, limits: RequestLimits, metrics: ProxyMetrics
    ) -> None:
        self._resolver = resolver
        self._identify = identify
        self._limits = limits
        self._metrics = metrics.rpcs
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Take no more requests: each is refused with a status. Returns when none is in flight."""
        self._draining = True
        await self._idle.wait()

    def add_to(self, server: aio.Server) -> None:
        """Serve on `server`: as the generated code would, but for requests that cannot be read."""
        handler = grpc.unary_unary_rpc_method_handler(
            self._infer,
            request_deserializer=partial(_parsed, max_pairs=self._limits.max_pairs),
            response_serializer=seniority_pb2.SeniorityResponseBatch.SerializeToString,
        )
        server.add_registered_method_handlers(SERVICE_NAME, {"InferSeniority": handler})

    async def _infer(
        self, request: seniority_pb2.SeniorityRequestBatch | InvalidRequest, context: Context
    ) -> seniority_pb2.SeniorityResponseBatch:
        """Answer a batch in its order, with its uuids."""
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._answered(request, context)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _answered(
        self, request: seniority_pb2.SeniorityRequestBatch | InvalidRequest, context: Context
    ) -> seniority_pb2.SeniorityResponseBatch:
        batch = seniority_pb2.SeniorityRequestBatch() if isinstance(request, InvalidRequest) else request
        size = len(batch.batch)
        answers = Answers([0] * size, ["failed"] * size)
        caller = Caller(ANONYMOUS, "interactive")
        code = grpc.StatusCode.CANCELLED  # unless it ends otherwise
        failure: Status | None = None
        started_at = time.perf_counter()
        try:
            caller = self._identify(context.invocation_metadata() or ())
            texts = self._texts(request)
            await self._resolver.resolve(texts, self._asker(caller, context), answers)
            code = grpc.StatusCode.OK
        except ProxyError as error:
            failure = status_of(error)
            code = failure.code
        except Exception:  # noqa: BLE001 - a defect costs this request a clear status, and no other anything
            _log.exception("a request failed unexpectedly")
            failure = Status(grpc.StatusCode.INTERNAL, "the proxy failed", ())
            code = failure.code
        finally:  # before the answer is on its way: who has it may look at the metrics
            self._metrics.count(
                code=code.name, seconds=time.perf_counter() - started_at, caller=caller.name,
                outcomes=answers.counted(),
            )  # fmt: skip
        if failure is not None:
            await _abort(context, failure)
        context.set_trailing_metadata(_hits_and_misses(answers.outcomes))
        return _response(batch, answers.levels)

    def _texts(
        self, request: seniority_pb2.SeniorityRequestBatch | InvalidRequest
    ) -> Sequence[tuple[str, str]]:
        if self._draining:
            raise Draining
        if isinstance(request, InvalidRequest):
            raise request
        if len(request.batch) > self._limits.max_pairs:
            raise _too_many(str(len(request.batch)), self._limits.max_pairs)
        texts = [(item.company, item.title) for item in request.batch]
        limit = self._limits.max_field_bytes
        for index, (company, title) in enumerate(texts):
            if len(company) + len(title) > limit // 4:  # a character is at most four bytes
                self._check_field(f"batch[{index}].company", company)
                self._check_field(f"batch[{index}].title", title)
        return texts

    def _check_field(self, field: str, text: str) -> None:
        size, limit = len(text.encode()), self._limits.max_field_bytes
        if size > limit:
            message = f"{field}: {size} bytes of text, the limit is {limit}"
            raise InvalidRequest(message, field)

    def _asker(self, caller: Caller, context: Context) -> Asker:
        left = context.time_remaining()
        wait_seconds = self._limits.max_wait_seconds if left is None else left
        return Asker(caller.name, caller.priority, asyncio.get_running_loop().time() + wait_seconds)


def _parsed(message: bytes, *, max_pairs: int) -> seniority_pb2.SeniorityRequestBatch | InvalidRequest:
    """The request, or why it is none: raised here, an error would read as the proxy's own failure.

    Pairs are counted before they are made: 64 MiB may hold 33 million empty ones, which take gigabytes.
    """
    try:
        most = 2 * max_pairs  # what is not far above the limit is made, so that its pairs can be counted
        if len(message) > _LEAST_PAIR_BYTES * most and holds_more_than(message, most):
            return _too_many(f"over {most}", max_pairs)
        return seniority_pb2.SeniorityRequestBatch.FromString(message)
    except (DecodeError, IndexError):
        return InvalidRequest("the request is not a SeniorityRequestBatch, or a text in it is not UTF-8")


def _too_many(pairs: str, limit: int) -> InvalidRequest:
    # The field is the batch itself: no pair of it is at fault, and without one it would still be refused.
    message = f"batch[{limit}]: the batch holds {pairs} pairs, the limit is {limit}"
    return InvalidRequest(message, "batch")


def _response(
    request: seniority_pb2.SeniorityRequestBatch, levels: Sequence[int]
) -> seniority_pb2.SeniorityResponseBatch:
    return seniority_pb2.SeniorityResponseBatch(
        batch=[
            seniority_pb2.SeniorityResponse(uuid=item.uuid, seniority=level)
            for item, level in zip(request.batch, levels, strict=True)
        ]
    )


def _hits_and_misses(outcomes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    hits = sum(outcome_kind(outcome) == "hit" for outcome in outcomes)
    return (("x-cache-hits", str(hits)), ("x-cache-misses", str(len(outcomes) - hits)))


async def _abort(context: Context, status: Status) -> NoReturn:
    await context.abort(status.code, status.message, trailing_metadata=status.trailers)
    raise AssertionError  # abort never returns
