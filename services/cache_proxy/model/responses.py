"""Read the model's responses: match levels to pairs, and find the pairs that a rejection names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from protos import seniority_pb2
from services.cache_proxy.errors import InvalidModelResponseError, PairRejectedError
from services.common.levels import MAX_LEVEL, MIN_LEVEL

PAIR_REJECTED_MESSAGE = "the model refused the pair"
REJECTION_CODES = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
)
# The queue ignores a later moment.
_MAX_PUSHBACK_SECONDS = 3600.0
_MAX_PUSHBACK_DIGITS = 15
_PAIR_INDEX_PATTERN = re.compile(r"batch\[(\d{1,6})\](\.company|\.title)?", re.ASCII)


def parse_response(message: bytes) -> seniority_pb2.SeniorityResponseBatch | None:
    """Parse a response message. Return None if it is not one."""
    try:
        return seniority_pb2.SeniorityResponseBatch.FromString(message)
    except DecodeError:
        return None


def join_levels(
    ids: Sequence[int], response: seniority_pb2.SeniorityResponseBatch
) -> list[int | InvalidModelResponseError]:
    """Return the levels of a response in the order of `ids`, or an error where one is invalid.

    Levels for ids that were not sent are ignored.
    """
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
            message = f"the model answered level {level}, outside {MIN_LEVEL} to {MAX_LEVEL}"
            joined.append(InvalidModelResponseError(message))
        else:
            joined.append(level)
    return joined


def rejected_pairs(
    trailers: Mapping[str, Any], code: grpc.StatusCode, message: str, pairs: int
) -> dict[int, PairRejectedError]:
    """Return the pairs that a rejection names by index, keyed by their index in the batch.

    An index is taken from `google.rpc.BadRequest` details, or else from the beginning of the status message.
    A description of one pair becomes that pair's reason. A text about several pairs may quote each of them,
    so it becomes the reason of none.
    """
    rejections: dict[int, PairRejectedError] = {}

    def add(match: re.Match[str], reason: str) -> None:
        rejections[int(match[1])] = PairRejectedError(
            code, reason or PAIR_REJECTED_MESSAGE, match[2] or "", reason
        )

    for field, description in _field_violations(trailers):
        match = _PAIR_INDEX_PATTERN.fullmatch(field)
        if match and int(match[1]) < pairs:
            repeats_message = pairs > 1 and message and message in description
            add(match, "" if repeats_message else description)
    if not rejections:
        # Only at the beginning: further on, the index could be part of a pair's own text.
        match = _PAIR_INDEX_PATTERN.match(message)
        if match and int(match[1]) < pairs:
            names_one = len({index for index, _ in _PAIR_INDEX_PATTERN.findall(message)}) == 1
            add(match, message if names_one else "")
    return rejections


def pushback_seconds(trailers: Mapping[str, Any]) -> float | None:
    """Return the delay before a retry that the model requests in `grpc-retry-pushback-ms`, if any."""
    text = str(trailers.get("grpc-retry-pushback-ms", ""))
    if not text.isdecimal() or len(text) > _MAX_PUSHBACK_DIGITS:
        return None
    return min(int(text) / 1000, _MAX_PUSHBACK_SECONDS)


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
    except DecodeError:
        # The details are a hint. Without them the rejected pair is found by bisection.
        return []
