"""Parses a queue's message into events about objects, and decides which of them can be augmented.

No I/O. The formats:

- S3 event notifications, directly or through SNS (with or without raw delivery): `Records`, keys encoded as
  in a URL query, https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
- EventBridge `Object Created` and the other events of `aws.s3`, keys not encoded,
  https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html
- EventBridge `AWS API Call via CloudTrail`, or CloudTrail's records themselves, keys not encoded.
- An array of such events, from a pipe or a function that passes them on in batches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

_READABLE_EVENT_PREFIXES = ("ObjectCreated", "ObjectRestore:Completed")
_READABLE_DETAIL_TYPES = {"Object Created", "Object Restore Completed"}
# In characters. A key has at most 1024 bytes, but a foreign message may have 1 MiB.
_MAX_LOG_CHARACTERS = 1_200
_API_CALL_DETAIL_TYPE = "AWS API Call via CloudTrail"
_API_EVENT_SOURCES = {"s3.amazonaws.com", "s3express.amazonaws.com"}
_API_WRITE_EVENTS = {"PutObject", "PostObject", "CopyObject", "CompleteMultipartUpload", "RenameObject"}


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """An event about one object.

    `bucket` and `key` are empty if the event has none, as a test event or one of another service.
    `is_readable`: the object can be read now, so it is to be augmented. `event_name` is the name in the
    event.
    """

    bucket: str
    key: str
    is_readable: bool = True
    is_test: bool = False
    event_name: str = ""

    def __str__(self) -> str:
        """Return the event for a log line."""
        uri = f"s3://{self.bucket}/{self.key}" if self.bucket else "no object"
        text = f"{self.event_name or 'an event'} about {uri}"
        return text if len(text) <= _MAX_LOG_CHARACTERS else f"{text[:_MAX_LOG_CHARACTERS]}…"


@dataclass(frozen=True, slots=True)
class EventMessage:
    """The events of one message. `unreadable_reason`: why a part of it could not be read, or empty."""

    events: list[ObjectEvent]
    unreadable_reason: str = ""


class UnreadableMessageError(Exception):
    """The message, or a record of it, is in none of the formats."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not an S3 event notification: {reason}")
        self.reason = reason


def parse_message(body: str) -> EventMessage:
    """Return the events of a message's body. Raises UnreadableMessageError if no event can be read."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnreadableMessageError("not JSON") from error
    if isinstance(event, list) and event:
        return _parse_all(event, _parse_event, problem="one of its events:")
    return _parse_event(event)


def _parse_event(event: Any) -> EventMessage:
    if not isinstance(event, dict):
        raise UnreadableMessageError("not a JSON object")
    # SNS wraps the message.
    if event.get("Type") == "Notification" and isinstance(event.get("Message"), str):
        return parse_message(event["Message"])
    if event.get("Event") == "s3:TestEvent":
        return EventMessage([_parse_test_event(event)])
    if "detail-type" in event:
        return EventMessage([_parse_event_bridge(event)])
    if _is_api_call(event):
        return EventMessage([_parse_api_call(event)])
    if isinstance(event.get("Records"), list) and event["Records"]:
        return _parse_all(event["Records"], _parse_record, problem="a record has")
    raise UnreadableMessageError("neither Records nor detail-type")


def _parse_test_event(event: dict[str, Any]) -> ObjectEvent:
    bucket = event.get("Bucket")
    return ObjectEvent(
        bucket if isinstance(bucket, str) else "",
        "",
        is_readable=False,
        is_test=True,
        event_name="s3:TestEvent",
    )


def _parse_event_bridge(event: dict[str, Any]) -> ObjectEvent:
    kind = _text_at(event, "detail-type")
    if event.get("source", "aws.s3") != "aws.s3":
        return ObjectEvent("", "", is_readable=False, event_name=kind)
    if kind != _API_CALL_DETAIL_TYPE:
        bucket = _text_at(event, "detail", "bucket", "name")
        key = _text_at(event, "detail", "object", "key")
        return ObjectEvent(bucket, key, is_readable=kind in _READABLE_DETAIL_TYPES, event_name=kind)
    return _parse_api_call(event, "detail")


def _parse_api_call(event: Any, *path: str) -> ObjectEvent:
    """Parse an API call as recorded by CloudTrail, which stands at a path of members."""
    event_name = _text_at(event, *path, "eventName")
    if _text_at(event, *path, "eventSource") not in _API_EVENT_SOURCES:
        return ObjectEvent("", "", is_readable=False, event_name=event_name)
    parameters = (*path, "requestParameters")
    bucket = _text_at(event, *parameters, "bucketName")
    key = _text_at(event, *parameters, "key")
    call = event[path[0]] if path else event
    # CloudTrail records failed calls, too.
    has_failed = call.get("errorCode") is not None
    return ObjectEvent(
        bucket, key, is_readable=event_name in _API_WRITE_EVENTS and not has_failed, event_name=event_name
    )


def _is_api_call(event: dict[str, Any]) -> bool:
    source = event.get("eventSource")
    return isinstance(source, str) and source in _API_EVENT_SOURCES


def _parse_all(parts: list[Any], parse_part: Callable[[Any], EventMessage], *, problem: str) -> EventMessage:
    """Return the events of all parts that can be read. Raises UnreadableMessageError if none can."""
    messages: list[EventMessage] = []
    unreadable: UnreadableMessageError | None = None
    for part in parts:
        try:
            messages.append(parse_part(part))
        except UnreadableMessageError as error:
            unreadable = unreadable or UnreadableMessageError(f"{problem} {error.reason}")
    if unreadable and not messages:
        raise unreadable
    reasons = [str(unreadable or ""), *(message.unreadable_reason for message in messages)]
    return EventMessage(
        [event for message in messages for event in message.events], next(filter(None, reasons), "")
    )


def _parse_record(record: Any) -> EventMessage:
    kind = _text_at(record, "eventName").removeprefix("s3:")
    if _is_api_call(record):
        return EventMessage([_parse_api_call(record)])
    source = record.get("eventSource", "aws:s3")
    # The first word of the source is `aws` in S3, but differs in Ceph and MinIO.
    if not isinstance(source, str) or not source.endswith(":s3"):
        return EventMessage([ObjectEvent("", "", is_readable=False, event_name=kind)])
    try:
        key = unquote_plus(_text_at(record, "s3", "object", "key"), errors="strict")
    except UnicodeDecodeError as error:
        raise UnreadableMessageError("a key that is not UTF-8") from error
    bucket = _text_at(record, "s3", "bucket", "name")
    return EventMessage(
        [ObjectEvent(bucket, key, is_readable=kind.startswith(_READABLE_EVENT_PREFIXES), event_name=kind)]
    )


def _text_at(event: Any, *path: str) -> str:
    """Return the text at a path of members. Raises UnreadableMessageError."""
    for name in path:
        event = event.get(name) if isinstance(event, dict) else None
    if not isinstance(event, str) or not event:
        message = f"no {'.'.join(path)}"
        raise UnreadableMessageError(message)
    return event
