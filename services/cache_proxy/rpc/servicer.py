"""The RPC: from the wire to the resolver and back, each pair counted once."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn, Protocol

import grpc
from grpc import aio

from protos import seniority_pb2
from services.cache_proxy.auth.caller import ANONYMOUS, Authenticator, Caller, Context
from services.cache_proxy.errors import (
    AccessDeniedError,
    DrainingError,
    InvalidRequestError,
    ProxyError,
    QueueFullError,
    QuotaExceededError,
)
from services.cache_proxy.queue.interface import RequestContext
from services.cache_proxy.resolver import Resolver, ResolveResult
from services.cache_proxy.rpc.grpc_status import GrpcStatus, to_grpc_status
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter
from services.cache_proxy.wire import batches, request_parser
from services.common.checkpoint import iter_chunks
from services.common.tracing import OFF, Tracing

SERVICE_NAME = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name

_RESPONSE_CHUNK_PAIRS = 5000
_SINGLE_L1_OUTCOME = {"l1": 1}
_SINGLE_HIT_TRAILERS = (("x-cache-hits", "1"), ("x-cache-misses", "0"))
_log = logging.getLogger(__name__)

SplitRequest = list[bytes] | InvalidRequestError


class RpcRecorder(Protocol):
    """Where RPCs that ended are counted: see `RpcMetrics`."""

    def count(self, *, code: str, seconds: float, caller: str, outcomes: Mapping[str, int]) -> None:
        """Count one, and its pairs by outcome."""

    def count_quota_rejection(self, *, account: str, quota: str) -> None:
        """Count one that was refused for a quota."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may hold, and how long a caller without a deadline waits."""

    max_pairs: int
    max_field_bytes: int
    max_wait_seconds: float


class SeniorityServicer:
    """Answers as the model would. The only place where errors become statuses.

    State: `_draining`, `_in_flight`, and `_idle`, set when it is 0 while draining.
    """

    def __init__(
        self,
        *,
        resolver: Resolver,
        authenticate: Authenticator,
        limits: RequestLimits,
        limiter: InboundLimiter,
        recorder: RpcRecorder,
        tracing: Tracing = OFF,
    ) -> None:
        self._resolver = resolver
        self._authenticate = authenticate
        self._limits = limits
        self._limiter = limiter
        self._recorder = recorder
        self._tracing = tracing
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()

    async def drain(self) -> None:
        """Take no more requests: each is refused with a status. Returns when none is in flight."""
        self._draining = True
        if self._in_flight:
            await self._idle.wait()

    def add_to(self, server: aio.Server) -> None:
        """Serve on `server`."""
        register_infer(server, self.infer)

    async def infer(self, _messages: object, context: Context) -> bytes:
        """Answer a batch in its order, with its uuids."""
        caller: Caller | InvalidRequestError
        answer = None
        try:
            caller = self._authenticate(context)
        except AccessDeniedError as error:  # before anything is read of theirs
            await self._reject(error, context)
        except InvalidRequestError as error:  # which counts with its pairs
            caller = error
        message = await self._read_message(context)
        if isinstance(caller, Caller) and not self._draining:
            answer = self._answer_single(message, caller, context)
        if answer is not None:
            return answer
        self._in_flight += 1
        try:
            request, size_bytes = batches.split(message, max_pairs=self._limits.max_pairs), len(message)
            del message  # it may be large, and all that matters of it is in the request
            return await self._handle(request, size_bytes, caller, context)
        finally:
            self._in_flight -= 1
            if self._draining and not self._in_flight:
                self._idle.set()

    def _answer_single(self, message: bytes, caller: Caller, context: Context) -> bytes | None:
        """The answer to one pair that L1 knows, with the other way's bookkeeping in its fewest steps."""
        started_at = time.perf_counter()
        answer = self._resolver.answer_one(message)
        if answer is not None:
            context.set_trailing_metadata(_SINGLE_HIT_TRAILERS)
            self._recorder.count(
                code="OK",
                seconds=time.perf_counter() - started_at,
                caller=caller.name,
                outcomes=_SINGLE_L1_OUTCOME,
            )
        return answer

    async def _read_message(self, context: Context) -> bytes:
        try:
            message = await self._limiter.read(context)
        except QueueFullError as error:
            await self._reject(error, context)
        if message is None:
            await context.abort(grpc.StatusCode.INTERNAL, "no request came")
        return message

    async def _reject(self, error: AccessDeniedError | QueueFullError, context: Context) -> NoReturn:
        status = to_grpc_status(error)
        self._recorder.count(code=status.code.name, seconds=0.0, caller=ANONYMOUS, outcomes={})
        await _abort(context, status)

    async def _handle(
        self, request: SplitRequest, size_bytes: int, caller: Caller | InvalidRequestError, context: Context
    ) -> bytes:
        answers = ResolveResult(0 if isinstance(request, InvalidRequestError) else len(request))
        code = grpc.StatusCode.CANCELLED  # unless it ends otherwise
        failure: GrpcStatus | None = None
        response = b""
        started_at = time.perf_counter()
        try:
            with self._limiter.track_request(context, size_bytes, pairs=answers.size):
                response = await self._resolve(request, caller, context, answers)
            code = grpc.StatusCode.OK
        except ProxyError as error:
            failure = to_grpc_status(error)
            code = failure.code
            if isinstance(error, QuotaExceededError):
                self._recorder.count_quota_rejection(account=error.account, quota=error.quota)
        except Exception:  # noqa: BLE001 - a defect costs this request a clear status, and no other anything
            _log.exception("a request failed unexpectedly")
            failure = GrpcStatus(grpc.StatusCode.INTERNAL, "the proxy failed", ())
            code = failure.code
        finally:  # before the answer is on its way: who has it may look at the metrics
            self._recorder.count(
                code=code.name,
                seconds=time.perf_counter() - started_at,
                caller=_caller_name(caller),
                outcomes=answers.outcome_counts(),
            )
        if failure is not None:
            await _abort(context, failure)
        self._limiter.track_response(context, len(response))
        hits = answers.hits
        context.set_trailing_metadata(
            (("x-cache-hits", str(hits)), ("x-cache-misses", str(answers.size - hits)))
        )
        return response

    async def _resolve(
        self,
        request: SplitRequest,
        caller: Caller | InvalidRequestError,
        context: Context,
        answers: ResolveResult,
    ) -> bytes:
        if isinstance(caller, InvalidRequestError):
            raise caller
        items = self._validate(request)
        replies, missing = await self._resolver.answer_known(items)
        if missing:
            pairs = await request_parser.parse(items, missing, max_field_bytes=self._limits.max_field_bytes)
            answers.record("l1", len(items) - len(missing))  # of a request that is refused, all failed
            await self._resolver.resolve(pairs, self._request_context(caller, context), answers)
            columns = zip(pairs.positions, pairs.items, pairs.key_offsets, answers.levels, strict=True)
            async for some in iter_chunks(range(len(pairs)), _RESPONSE_CHUNK_PAIRS):
                for position, item, start, level in islice(columns, len(some)):
                    replies[position] = item[:start] + batches.LEVEL_SUFFIXES[level]
        else:
            answers.record("l1", len(items))
        return batches.join(replies)

    def _validate(self, request: SplitRequest) -> Sequence[bytes]:
        if self._draining:
            raise DrainingError
        if isinstance(request, InvalidRequestError):
            raise request
        if len(request) > self._limits.max_pairs:
            raise batches.pair_limit_error(str(len(request)), self._limits.max_pairs)
        return request

    def _request_context(self, caller: Caller, context: Context) -> RequestContext:
        left = context.time_remaining()
        wait_seconds = self._limits.max_wait_seconds if left is None else left
        deadline = asyncio.get_running_loop().time() + wait_seconds
        return RequestContext(
            caller.name,
            caller.priority,
            deadline,
            self._tracing.current_context(),
            request_id=secrets.token_hex(8),
        )


def register_infer(server: aio.Server, infer: Callable[[object, Context], Awaitable[bytes]]) -> None:
    """Have `infer` answer on `server`: as the generated code would, but from bytes to bytes.

    As to a stream of requests, which is the same on the wire, so that `Intake` decides what is read.
    """
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(infer)
    server.add_registered_method_handlers(SERVICE_NAME, {"InferSeniority": handler})


def _caller_name(caller: Caller | InvalidRequestError) -> str:
    return ANONYMOUS if isinstance(caller, InvalidRequestError) else caller.name


async def _abort(context: Context, status: GrpcStatus) -> NoReturn:
    await context.abort(status.code, status.message, trailing_metadata=status.trailers)
    raise AssertionError  # abort never returns
