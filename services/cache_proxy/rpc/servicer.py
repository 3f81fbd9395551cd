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
from services.cache_proxy.auth.caller import ANONYMOUS, Caller, Context, Identify
from services.cache_proxy.errors import (
    AccessRefused,
    Draining,
    InvalidRequest,
    OverQuota,
    ProxyError,
    QueueFull,
)
from services.cache_proxy.queue.interface import Asker
from services.cache_proxy.resolver import Answers, Resolver
from services.cache_proxy.rpc.grpc_status import Status, status_of
from services.cache_proxy.rpc.inbound_limiter import Intake
from services.cache_proxy.wire import batches, request_parser
from services.common.checkpoint import in_breaths
from services.common.tracing import OFF, Tracing

SERVICE_NAME = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name

_BREATH_ANSWERS = 5000
_ONE_L1 = {"l1": 1}
_ONE_HIT = (("x-cache-hits", "1"), ("x-cache-misses", "0"))
_log = logging.getLogger(__name__)

Request = list[bytes] | InvalidRequest


class RpcBooks(Protocol):
    """Where RPCs that ended are counted: see `RpcMetrics`."""

    def count(self, *, code: str, seconds: float, caller: str, outcomes: Mapping[str, int]) -> None:
        """Count one, and its pairs by outcome."""

    def count_over_quota(self, *, account: str, quota: str) -> None:
        """Count one that was refused for a quota."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may hold, and how long a caller without a deadline waits."""

    max_pairs: int
    max_field_bytes: int
    max_wait_seconds: float


class SeniorityService:
    """Answers as the model would. The only place where errors become statuses.

    State: `_draining`, `_in_flight`, and `_idle`, set when it is 0 while draining.
    """

    def __init__(
        self, *, resolver: Resolver, identify: Identify, limits: RequestLimits, intake: Intake,
        books: RpcBooks, tracing: Tracing = OFF,
    ) -> None:  # fmt: skip
        self._resolver = resolver
        self._identify = identify
        self._limits = limits
        self._intake = intake
        self._books = books
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
        serve_on(server, self.infer)

    async def infer(self, _messages: object, context: Context) -> bytes:
        """Answer a batch in its order, with its uuids."""
        caller: Caller | InvalidRequest
        answer = None
        try:
            caller = self._identify(context)
        except AccessRefused as error:  # before anything is read of theirs
            await self._turned_away(error, context)
        except InvalidRequest as error:  # which counts with its pairs
            caller = error
        message = await self._read(context)
        if isinstance(caller, Caller) and not self._draining:
            answer = self._answer_one(message, caller, context)
        if answer is not None:
            return answer
        self._in_flight += 1
        try:
            request, size_bytes = batches.split(message, max_pairs=self._limits.max_pairs), len(message)
            del message  # it may be large, and all that matters of it is in the request
            return await self._answered(request, size_bytes, caller, context)
        finally:
            self._in_flight -= 1
            if self._draining and not self._in_flight:
                self._idle.set()

    def _answer_one(self, message: bytes, caller: Caller, context: Context) -> bytes | None:
        """The answer to one pair that L1 knows, with the other way's bookkeeping in its fewest steps."""
        started_at = time.perf_counter()
        answer = self._resolver.answer_one(message)
        if answer is not None:
            context.set_trailing_metadata(_ONE_HIT)
            self._books.count(
                code="OK", seconds=time.perf_counter() - started_at, caller=caller.name, outcomes=_ONE_L1
            )
        return answer

    async def _read(self, context: Context) -> bytes:
        try:
            message = await self._intake.read(context)
        except QueueFull as error:
            await self._turned_away(error, context)
        if message is None:
            await context.abort(grpc.StatusCode.INTERNAL, "no request came")
        return message

    async def _turned_away(self, error: AccessRefused | QueueFull, context: Context) -> NoReturn:
        status = status_of(error)
        self._books.count(code=status.code.name, seconds=0.0, caller=ANONYMOUS, outcomes={})
        await _abort(context, status)

    async def _answered(
        self, request: Request, size_bytes: int, caller: Caller | InvalidRequest, context: Context
    ) -> bytes:
        answers = Answers(0 if isinstance(request, InvalidRequest) else len(request))
        code = grpc.StatusCode.CANCELLED  # unless it ends otherwise
        failure: Status | None = None
        response = b""
        started_at = time.perf_counter()
        try:
            with self._intake.held(context, size_bytes, pairs=answers.size):
                response = await self._response(request, caller, context, answers)
            code = grpc.StatusCode.OK
        except ProxyError as error:
            failure = status_of(error)
            code = failure.code
            if isinstance(error, OverQuota):
                self._books.count_over_quota(account=error.account, quota=error.quota)
        except Exception:  # noqa: BLE001 - a defect costs this request a clear status, and no other anything
            _log.exception("a request failed unexpectedly")
            failure = Status(grpc.StatusCode.INTERNAL, "the proxy failed", ())
            code = failure.code
        finally:  # before the answer is on its way: who has it may look at the metrics
            self._books.count(
                code=code.name, seconds=time.perf_counter() - started_at, caller=_name(caller),
                outcomes=answers.counted(),
            )  # fmt: skip
        if failure is not None:
            await _abort(context, failure)
        self._intake.hold_until_sent(context, len(response))
        hits = answers.hits
        context.set_trailing_metadata(
            (("x-cache-hits", str(hits)), ("x-cache-misses", str(answers.size - hits)))
        )
        return response

    async def _response(
        self, request: Request, caller: Caller | InvalidRequest, context: Context, answers: Answers
    ) -> bytes:
        if isinstance(caller, InvalidRequest):
            raise caller
        items = self._checked(request)
        replies, missing = await self._resolver.answer_known(items)
        if missing:
            pairs = await request_parser.read(items, missing, max_field_bytes=self._limits.max_field_bytes)
            answers.count("l1", len(items) - len(missing))  # of a request that is refused, all failed
            await self._resolver.resolve(pairs, self._asker(caller, context), answers)
            columns = zip(pairs.positions, pairs.items, pairs.starts, answers.levels, strict=True)
            async for some in in_breaths(range(len(pairs)), _BREATH_ANSWERS):
                for position, item, start, level in islice(columns, len(some)):
                    replies[position] = item[:start] + batches.ANSWER_TAILS[level]
        else:
            answers.count("l1", len(items))
        return batches.join(replies)

    def _checked(self, request: Request) -> Sequence[bytes]:
        if self._draining:
            raise Draining
        if isinstance(request, InvalidRequest):
            raise request
        if len(request) > self._limits.max_pairs:
            raise batches.too_many(str(len(request)), self._limits.max_pairs)
        return request

    def _asker(self, caller: Caller, context: Context) -> Asker:
        left = context.time_remaining()
        wait_seconds = self._limits.max_wait_seconds if left is None else left
        deadline = asyncio.get_running_loop().time() + wait_seconds
        return Asker(
            caller.name, caller.priority, deadline, self._tracing.here(), request=secrets.token_hex(8)
        )


def serve_on(server: aio.Server, infer: Callable[[object, Context], Awaitable[bytes]]) -> None:
    """Have `infer` answer on `server`: as the generated code would, but from bytes to bytes.

    As to a stream of requests, which is the same on the wire, so that `Intake` decides what is read.
    """
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(infer)
    server.add_registered_method_handlers(SERVICE_NAME, {"InferSeniority": handler})


def _name(caller: Caller | InvalidRequest) -> str:
    return ANONYMOUS if isinstance(caller, InvalidRequest) else caller.name


async def _abort(context: Context, status: Status) -> NoReturn:
    await context.abort(status.code, status.message, trailing_metadata=status.trailers)
    raise AssertionError  # abort never returns
