"""What a queue's message says: which objects were made. Pure."""

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus


@dataclass(frozen=True, slots=True)
class Notice:
    """An object that was made."""

    bucket: str
    key: str


class UnreadableMessageError(Exception):
    """The message is no S3 event notification."""


def read(body: str) -> list[Notice]:
    """The objects that the message tells of: from S3 itself, through SNS, or through EventBridge.

    A test event, and one of anything but an object made, tells of none. Raises UnreadableMessageError.
    """
    try:
        return _notices(json.loads(body))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"not an S3 event notification: {type(error).__name__}: {error}"
        raise UnreadableMessageError(message) from error


def _notices(event: Any) -> list[Notice]:
    if event.get("Type") == "Notification" and "Message" in event:  # SNS without raw delivery
        return _notices(json.loads(event["Message"]))
    if event.get("Event") == "s3:TestEvent":
        return []
    if "detail-type" in event:  # EventBridge, which does not encode keys
        if event["detail-type"] != "Object Created":
            return []
        return [Notice(event["detail"]["bucket"]["name"], event["detail"]["object"]["key"])]
    return [
        Notice(record["s3"]["bucket"]["name"], unquote_plus(record["s3"]["object"]["key"]))
        for record in event["Records"]
        if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:")
    ]
