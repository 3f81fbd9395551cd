"""The RPC of the stub: wait for capacity, simulate latency and faults, answer, and log the call."""

import asyncio
import random
import time
from collections.abc import Sequence

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio

from protos import seniority_pb2, seniority_pb2_grpc
from services.common.levels import MAX_LEVEL
from services.model_stub.call_log import CallLog
from services.model_stub.capacity import Capacity
from services.model_stub.faults import Faults
from services.model_stub.levels import fold, infer_level

_POISON_MESSAGE = "the model cannot judge a pair of this batch"


class ModelStub(seniority_pb2_grpc.SeniorityModelServicer):
    """Answers `InferSeniority` as the model would, within its capacity and with the configured faults."""

    def __init__(
        self, *, capacity: Capacity, latency_seconds: float, max_batch: int, faults: Faults, log: CallLog
    ) -> None:
        self._capacity = capacity
        self._latency_seconds = latency_seconds
        self._max_batch = max_batch
        self._faults = faults
        self._log = log
        self._random = random.Random()  # noqa: S311 - faults need no secrecy

    async def InferSeniority(  # noqa: N802 - the contract's name
        self,
        request: seniority_pb2.SeniorityRequestBatch,
        context: aio.ServicerContext[
            seniority_pb2.SeniorityRequestBatch, seniority_pb2.SeniorityResponseBatch
        ],
    ) -> seniority_pb2.SeniorityResponseBatch:
        """Answer one batch; the call is logged however it ends."""
        at, queued_seconds, code = time.time(), 0.0, "CANCELLED"
        pairs = [(item.company, item.title) for item in request.batch]
        levels: list[int | None] = [None] * len(pairs)
        try:
            queued_seconds = await self._capacity.wait_for_slot(len(pairs))
            await asyncio.sleep(self._latency_seconds)
            refusal = await self._rejection(pairs)
            if refusal is not None:
                code = refusal[0].name
                await context.abort(refusal[0], refusal[1], trailing_metadata=refusal[2])
            levels = self._levels(pairs)
            code = "OK"
            return self._response(request, levels)
        finally:
            self._log.write(at=at, queued_seconds=queued_seconds, code=code, pairs=pairs, levels=levels)

    async def _rejection(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]] | None:
        if len(pairs) > self._max_batch:
            message = f"a batch takes at most {self._max_batch} requests, this one has {len(pairs)}"
            return grpc.StatusCode.INVALID_ARGUMENT, message, ()
        if self._random.random() < self._faults.hang_share:
            await asyncio.Event().wait()
        for code, share in self._faults.codes:
            if self._random.random() < share:
                return code, f"the stub was told to fail with {code.name}", ()
        for index, pair in enumerate(pairs):
            if _contains_any(pair, self._faults.poison_named):
                return grpc.StatusCode.INVALID_ARGUMENT, _POISON_MESSAGE, _bad_request_details(index)
            if _contains_any(pair, self._faults.poison):
                return grpc.StatusCode.INVALID_ARGUMENT, _POISON_MESSAGE, ()
        return None

    def _levels(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        levels: list[int | None] = []
        for company, title in pairs:
            if self._random.random() < self._faults.missing_share:
                levels.append(None)
            elif self._random.random() < self._faults.out_of_range_share:
                levels.append(MAX_LEVEL + 2)
            else:
                levels.append(infer_level(company, title))
        return levels

    def _response(
        self, request: seniority_pb2.SeniorityRequestBatch, levels: Sequence[int | None]
    ) -> seniority_pb2.SeniorityResponseBatch:
        answers = [
            seniority_pb2.SeniorityResponse(uuid=item.uuid, seniority=level)
            for item, level in zip(request.batch, levels, strict=True)
            if level is not None
        ]
        if self._faults.scramble:
            self._random.shuffle(answers)
        return seniority_pb2.SeniorityResponseBatch(batch=answers)


def _contains_any(pair: tuple[str, str], poisons: Sequence[str]) -> bool:
    return any(fold(poison) in fold(text) for poison in poisons for text in pair)


def _bad_request_details(index: int) -> tuple[tuple[str, bytes], ...]:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=f"batch[{index}]", description=_POISON_MESSAGE
    )
    status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=_POISON_MESSAGE)
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return (("grpc-status-details-bin", status.SerializeToString()),)
