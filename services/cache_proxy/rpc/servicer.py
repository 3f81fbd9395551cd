"""The InferSeniority RPC: parse the request, resolve its pairs, return levels, count each pair once."""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

import grpc
from grpc import aio

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
from services.cache_proxy.rpc.infer_method import register_infer
from services.cache_proxy.rpc.recorder import RpcRecorder
from services.cache_proxy.wire import batches, request_parser
from services.common.checkpoint import iter_chunks
from services.common.tracing import OFF, Tracing

_RESPONSE_CHUNK_PAIRS = 5000
_SINGLE_L1_OUTCOME = {"l1": 1}
_SINGLE_HIT_TRAILERS = (("x-cache-hits", "1"), ("x-cache-misses", "0"))
_log = logging.getLogger(__name__)

SplitRequest = list[bytes] | InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of one request, and how long a caller without a deadline waits."""

    max_pairs: int
    max_field_bytes: int
    max_wait_seconds: float


class SeniorityServicer:
    """Implement the model's interface. It alone converts errors to gRPC statuses.

    State: `_draining`; `_active_rpcs`, the number of RPCs that are being processed; `_idle`, set when that
    number reaches 0 while draining.
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
        self._active_rpcs = 0
        self._idle = asyncio.Event()

    async def drain(self) -> None:
        """Reject every further request with a status. Return when none is in progress."""
        self._draining = True
        if self._active_rpcs:
            await self._idle.wait()

    def add_to(self, server: aio.Server) -> None:
        """Register the method on `server`."""
        register_infer(server, self.infer)

    async def infer(self, _messages: object, context: Context) -> bytes:
        """Return the levels of a batch, in its order and with its uuids."""
        caller: Caller | InvalidRequestError
        response = None
        try:
            caller = self._authenticate(context)
        except AccessDeniedError as error:
            # Nothing of the request was read yet.
            await self._reject(error, context)
        except InvalidRequestError as error:
            # The request is read all the same, so that its pairs can be counted as failed.
            caller = error
        message = await self._read_message(context)
        if isinstance(caller, Caller) and not self._draining:
            response = self._answer_single(message, caller, context)
        if response is not None:
            return response
        self._active_rpcs += 1
        try:
            request, size_bytes = batches.split(message, max_pairs=self._limits.max_pairs), len(message)
            # The message may be large, and the request has all that is needed of it.
            del message
            return await self._handle(request, size_bytes, caller, context)
        finally:
            self._active_rpcs -= 1
            if self._draining and not self._active_rpcs:
                self._idle.set()

    def _answer_single(self, message: bytes, caller: Caller, context: Context) -> bytes | None:
        """Return the response to a request of one pair that L1 knows, None for any other.

        It records the same as `_handle`, in as few steps as possible.
        """
        started_at = time.perf_counter()
        response = self._resolver.answer_one(message)
        if response is not None:
            context.set_trailing_metadata(_SINGLE_HIT_TRAILERS)
            self._recorder.count(
                code="OK",
                seconds=time.perf_counter() - started_at,
                caller=caller.name,
                outcomes=_SINGLE_L1_OUTCOME,
            )
        return response

    async def _read_message(self, context: Context) -> bytes:
        try:
            message = await self._limiter.read(context)
        except QueueFullError as error:
            await self._reject(error, context)
        if message is None:
            await context.abort(grpc.StatusCode.INTERNAL, "no request came")
        return message

    async def _reject(self, error: AccessDeniedError | QueueFullError, context: Context) -> NoReturn:
        """End an RPC whose request was not read, so that it has no pairs to count."""
        status = to_grpc_status(error)
        self._recorder.count(code=status.code.name, seconds=0.0, caller=ANONYMOUS, outcomes={})
        await _abort(context, status)

    async def _handle(
        self,
        request: SplitRequest,
        size_bytes: int,
        caller: Caller | InvalidRequestError,
        context: Context,
    ) -> bytes:
        """Resolve a request and record it. Errors end the RPC with their status."""
        result = ResolveResult(0 if isinstance(request, InvalidRequestError) else len(request))
        # The code that is recorded if the RPC is cancelled.
        code = grpc.StatusCode.CANCELLED
        failure: GrpcStatus | None = None
        response = b""
        started_at = time.perf_counter()
        try:
            with self._limiter.track_request(context, size_bytes, pairs=result.size):
                response = await self._resolve(request, caller, context, result)
            code = grpc.StatusCode.OK
        except ProxyError as error:
            failure = to_grpc_status(error)
            code = failure.code
            if isinstance(error, QuotaExceededError):
                self._recorder.count_quota_rejection(account=error.account, quota=error.quota)
        # An unexpected exception fails this request with a clear status, and no other request.
        except Exception:  # noqa: BLE001
            _log.exception("a request failed unexpectedly")
            failure = GrpcStatus(grpc.StatusCode.INTERNAL, "the proxy failed", ())
            code = failure.code
        finally:
            # Recorded before the response is sent: a caller that has its response may read the metrics.
            self._recorder.count(
                code=code.name,
                seconds=time.perf_counter() - started_at,
                caller=_caller_name(caller),
                outcomes=result.outcome_counts(),
            )
        if failure is not None:
            await _abort(context, failure)
        self._limiter.track_response(context, len(response))
        hits = result.hits
        context.set_trailing_metadata(
            (("x-cache-hits", str(hits)), ("x-cache-misses", str(result.size - hits)))
        )
        return response

    async def _resolve(
        self,
        request: SplitRequest,
        caller: Caller | InvalidRequestError,
        context: Context,
        result: ResolveResult,
    ) -> bytes:
        """Return the response, and record the outcome of each pair in `result`. Raise `ProxyError`."""
        if isinstance(caller, InvalidRequestError):
            raise caller
        items = self._validate(request)
        answers, missing = await self._resolver.answer_known(items)
        if missing:
            columns = await request_parser.parse(items, missing, max_field_bytes=self._limits.max_field_bytes)
            # Recorded only now: in a request that is rejected, every pair counts as failed.
            result.record("l1", len(items) - len(missing))
            await self._resolver.resolve(columns, self._request_context(caller, context), result)
            rows = zip(columns.positions, columns.items, columns.key_offsets, result.levels, strict=True)
            async for chunk in iter_chunks(range(len(columns)), _RESPONSE_CHUNK_PAIRS):
                for position, item, offset, level in islice(rows, len(chunk)):
                    answers[position] = item[:offset] + batches.LEVEL_SUFFIXES[level]
        else:
            result.record("l1", len(items))
        return batches.join(answers)

    def _validate(self, request: SplitRequest) -> Sequence[bytes]:
        if self._draining:
            raise DrainingError
        if isinstance(request, InvalidRequestError):
            raise request
        if len(request) > self._limits.max_pairs:
            raise batches.pair_limit_error(str(len(request)), self._limits.max_pairs)
        return request

    def _request_context(self, caller: Caller, context: Context) -> RequestContext:
        remaining = context.time_remaining()
        wait_seconds = self._limits.max_wait_seconds if remaining is None else remaining
        deadline = asyncio.get_running_loop().time() + wait_seconds
        return RequestContext(
            caller.name,
            caller.priority,
            deadline,
            self._tracing.current_context(),
            request_id=secrets.token_hex(8),
        )


def _caller_name(caller: Caller | InvalidRequestError) -> str:
    return ANONYMOUS if isinstance(caller, InvalidRequestError) else caller.name


async def _abort(context: Context, status: GrpcStatus) -> NoReturn:
    await context.abort(status.code, status.message, trailing_metadata=status.trailers)
    # gRPC's abort always raises.
    raise AssertionError
