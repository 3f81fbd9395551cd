"""Read a queue's message: which objects in which buckets it is about, and whether they are to be augmented.

Pure. The formats:

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

_EVENT_NAMES = ("ObjectCreated", "ObjectRestore:Completed")
_DETAIL_TYPES = {"Object Created", "Object Restore Completed"}
_MAX_SHOWN = 1_200  # characters; a key has 1024 bytes at most, a message of somebody else's 1 MiB
_API_CALL = "AWS API Call via CloudTrail"
_API_SOURCES = {"s3.amazonaws.com", "s3express.amazonaws.com"}
_API_WRITES = {"PutObject", "PostObject", "CopyObject", "CompleteMultipartUpload", "RenameObject"}


@dataclass(frozen=True, slots=True)
class Notice:
    """An event about one object.

    `bucket` and `key` are empty where an event names none (an event of another service, a test event).
    `starts`: the object can be read now, so it is to be augmented. `kind`: the event's own name.
    """

    bucket: str
    key: str
    starts: bool = True
    is_test: bool = False
    kind: str = ""

    def __str__(self) -> str:
        """Return the event for a log line."""
        place = f"s3://{self.bucket}/{self.key}" if self.bucket else "no object"
        text = f"{self.kind or 'an event'} about {place}"
        return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


@dataclass(frozen=True, slots=True)
class Message:
    """The events of a message. `not_understood`: why a part of it could not be read; empty if all could."""

    notices: list[Notice]
    not_understood: str = ""


class UnreadableMessageError(Exception):
    """The message, or a record of it, is in none of the formats."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not an S3 event notification: {reason}")
        self.reason = reason


def read(body: str) -> Message:
    """Return the events of a message's body. Raises UnreadableMessageError if there is not one."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnreadableMessageError("not JSON") from error
    if isinstance(event, list) and event:
        return _joined(event, _of_event, problem="one of its events:")
    return _of_event(event)


def _of_event(event: Any) -> Message:
    if not isinstance(event, dict):
        raise UnreadableMessageError("not a JSON object")
    if event.get("Type") == "Notification" and isinstance(event.get("Message"), str):  # SNS
        return read(event["Message"])
    if event.get("Event") == "s3:TestEvent":
        return Message([_test_event(event)])
    if "detail-type" in event:
        return Message([_of_event_bridge(event)])
    if _is_api_call(event):
        return Message([_of_api_call(event)])
    if isinstance(event.get("Records"), list) and event["Records"]:
        return _joined(event["Records"], _of_record, problem="a record has")
    raise UnreadableMessageError("neither Records nor detail-type")


def _test_event(event: dict[str, Any]) -> Notice:
    bucket = event.get("Bucket")
    return Notice(
        bucket if isinstance(bucket, str) else "", "", starts=False, is_test=True, kind="s3:TestEvent"
    )


def _of_event_bridge(event: dict[str, Any]) -> Notice:
    kind = _text(event, "detail-type")
    if event.get("source", "aws.s3") != "aws.s3":
        return Notice("", "", starts=False, kind=kind)
    if kind != _API_CALL:
        bucket, key = _text(event, "detail", "bucket", "name"), _text(event, "detail", "object", "key")
        return Notice(bucket, key, starts=kind in _DETAIL_TYPES, kind=kind)
    return _of_api_call(event, "detail")


def _of_api_call(event: Any, *path: str) -> Notice:
    """Return what CloudTrail recorded, which stands at a path of members."""
    name = _text(event, *path, "eventName")
    if _text(event, *path, "eventSource") not in _API_SOURCES:
        return Notice("", "", starts=False, kind=name)
    parameters = (*path, "requestParameters")
    bucket, key = _text(event, *parameters, "bucketName"), _text(event, *parameters, "key")
    call = event[path[0]] if path else event
    refused = call.get("errorCode") is not None  # CloudTrail records calls that failed, too
    return Notice(bucket, key, starts=name in _API_WRITES and not refused, kind=name)


def _is_api_call(event: dict[str, Any]) -> bool:
    source = event.get("eventSource")
    return isinstance(source, str) and source in _API_SOURCES


def _joined(parts: list[Any], read_part: Callable[[Any], Message], *, problem: str) -> Message:
    """Return the events of all parts that can be read. Raises UnreadableMessageError if none can."""
    messages: list[Message] = []
    unreadable: UnreadableMessageError | None = None
    for part in parts:
        try:
            messages.append(read_part(part))
        except UnreadableMessageError as error:
            unreadable = unreadable or UnreadableMessageError(f"{problem} {error.reason}")
    if unreadable and not messages:
        raise unreadable
    reasons = [str(unreadable or ""), *(message.not_understood for message in messages)]
    return Message(
        [notice for message in messages for notice in message.notices], next(filter(None, reasons), "")
    )


def _of_record(record: Any) -> Message:
    kind = _text(record, "eventName").removeprefix("s3:")
    if _is_api_call(record):
        return Message([_of_api_call(record)])
    source = record.get("eventSource", "aws:s3")
    if not isinstance(source, str) or not source.endswith(":s3"):  # Ceph and MinIO have their own first word
        return Message([Notice("", "", starts=False, kind=kind)])
    try:
        key = unquote_plus(_text(record, "s3", "object", "key"), errors="strict")
    except UnicodeDecodeError as error:
        raise UnreadableMessageError("a key that is not UTF-8") from error
    bucket = _text(record, "s3", "bucket", "name")
    return Message([Notice(bucket, key, starts=kind.startswith(_EVENT_NAMES), kind=kind)])


def _text(event: Any, *path: str) -> str:
    """Return the text at a path of members. Raises UnreadableMessageError."""
    for name in path:
        event = event.get(name) if isinstance(event, dict) else None
    if not isinstance(event, str) or not event:
        message = f"no {'.'.join(path)}"
        raise UnreadableMessageError(message)
    return event
