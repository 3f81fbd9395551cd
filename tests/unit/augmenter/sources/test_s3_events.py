"""Tests of parsing a queue's message, in every format of S3's events."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.sources import s3_events
from services.augmenter.sources.s3_events import ObjectEvent
from tests.support.sqs_server import object_created_event


def _parse(body: object) -> list[tuple[str, str, bool]]:
    """Return bucket, key and readability of the object of each event in a message."""
    text = body if isinstance(body, str) else json.dumps(body)
    return [(event.bucket, event.key, event.is_readable) for event in s3_events.parse_message(text).events]


def record(name: str, bucket: str = "b", key: str = "raw/1.jsonl", **more: Any) -> dict[str, Any]:
    """Return a record of an S3 event notification."""
    location = {"bucket": {"name": bucket}, "object": {"key": key}}
    return {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": name, "s3": location, **more}


def event_bridge(detail_type: str, key: str = "raw/1.jsonl", **more: Any) -> dict[str, Any]:
    """Return an EventBridge event of S3."""
    detail = {"version": "0", "bucket": {"name": "b"}, "object": {"key": key, "version-id": "v1"}}
    return {"version": "0", "source": "aws.s3", "detail-type": detail_type, "detail": detail, **more}


def cloudtrail(call: str, key: str | None = "raw/1.jsonl", **more: Any) -> dict[str, Any]:
    """Return an API call as CloudTrail reports it to EventBridge."""
    parameters = {"bucketName": "b", **({} if key is None else {"key": key})}
    detail = {
        "eventSource": "s3.amazonaws.com",
        "eventName": call,
        "requestParameters": parameters,
        **more,
    }
    return {"source": "aws.s3", "detail-type": "AWS API Call via CloudTrail", "detail": detail}


@pytest.mark.parametrize(
    "event",
    [
        {"Records": [record("ObjectCreated:Put")]},
        {"Records": [record("s3:ObjectCreated:CompleteMultipartUpload")]},
        {"Records": [record("ObjectCreated:Copy", eventVersion="2.4", eventSource="ceph:s3")]},
        {"Records": [record("ObjectRestore:Completed")]},
        {"Records": [record("s3:ObjectRestore:Completed")]},
        {"Type": "Notification", "Message": json.dumps({"Records": [record("ObjectCreated:Post")]})},
        {"Type": "Notification", "Message": json.dumps(event_bridge("Object Created"))},
        event_bridge("Object Created"),
        event_bridge("Object Restore Completed"),
        cloudtrail("PutObject"),
        cloudtrail("CompleteMultipartUpload"),
        cloudtrail("CopyObject"),
        {"Records": [cloudtrail("PutObject")["detail"]]},
        {"Type": "Notification", "Message": json.dumps(cloudtrail("PutObject"))},
        cloudtrail("PutObject")["detail"],
    ],
)
def test_event_of_a_new_or_restored_object_is_readable(event: object) -> None:
    """Events of new and restored objects are readable, from S3, SNS, EventBridge and CloudTrail."""
    assert _parse(event) == [("b", "raw/1.jsonl", True)]


@pytest.mark.parametrize(
    "event",
    [
        {"Records": [record("ObjectRemoved:Delete")]},
        {"Records": [record("ObjectRestore:Post")]},
        {"Records": [record("ObjectTagging:Put")]},
        {"Records": [record("LifecycleTransition")]},
        event_bridge("Object Deleted"),
        event_bridge("Object Restore Initiated"),
        event_bridge("Object Storage Class Changed"),
        cloudtrail("GetObject"),
        cloudtrail("DeleteObject"),
        cloudtrail("PutObject", errorCode="AccessDenied"),
        {"Records": [cloudtrail("PutObject", errorCode="AccessDenied")["detail"]]},
    ],
)
def test_other_events_name_their_object_but_are_not_readable(event: object) -> None:
    """Events of removed or tagged objects, and of failed calls, are not readable."""
    assert _parse(event) == [("b", "raw/1.jsonl", False)]


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (object_created_event("b", "raw/a+b%2Fc%3D.jsonl"), "raw/a b/c=.jsonl"),
        ({"Type": "Notification", "Message": json.dumps(object_created_event("b", "k%2B"))}, "k+"),
        (object_created_event("b", "%C3%BC"), "ü"),
        (event_bridge("Object Created", "a+b%2F"), "a+b%2F"),
        (event_bridge("Object Restore Completed", "a+b%2F"), "a+b%2F"),
        (cloudtrail("PutObject", "a+b%2F ü"), "a+b%2F ü"),
        ({"Records": [cloudtrail("PutObject", "a+b%2F ü")["detail"]]}, "a+b%2F ü"),
    ],
)
def test_key_is_decoded_only_where_it_is_encoded(event: object, key: str) -> None:
    """Keys are URL-decoded in S3's own notifications, but not in events of EventBridge and CloudTrail."""
    assert _parse(event) == [("b", key, True)]


@pytest.mark.parametrize(
    "event",
    [
        {"source": "aws.ec2", "detail-type": "EC2 Instance State-change Notification", "detail": {}},
        {"source": "my.app", "detail-type": "Object Created", "detail": event_bridge("x")["detail"]},
        cloudtrail("PutObject", eventSource="glacier.amazonaws.com"),
        {"Records": [record("INSERT", eventSource="aws:dynamodb")]},
        {"Records": [record("ObjectCreated:Put", eventSource=None)]},
    ],
)
def test_event_of_another_service_names_no_object(event: object) -> None:
    """An event of another service names no object, whatever its detail contains."""
    assert _parse(event) == [("", "", False)]


def test_array_of_events_is_read_event_by_event() -> None:
    """In an array of events, an unreadable one does not hide the others, and its reason is kept."""
    events = [event_bridge("Object Created", "1"), {"Records": [record("ObjectCreated:Put", key="2")]}]
    assert [key for _, key, _ in _parse(events)] == ["1", "2"]
    for other, reason in (
        (7, "one of its events: not a JSON object"),
        ([events], "one of its events: not a JSON object"),
        ({"Records": [record("ObjectCreated:Put"), {}]}, "a record has no eventName"),
    ):
        message = s3_events.parse_message(json.dumps([other, cloudtrail("PutObject", "3")]))
        assert message.events[-1].key == "3"
        assert message.unreadable_reason == f"not an S3 event notification: {reason}"


def test_test_event_names_its_bucket() -> None:
    """The test event that S3 sends for a new notification names its bucket."""
    event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"}
    expected = ObjectEvent("b", "", is_readable=False, is_test=True, event_name="s3:TestEvent")
    assert s3_events.parse_message(json.dumps(event)).events == [expected]


def test_event_is_logged_in_a_short_line() -> None:
    """The text of an event in a log line is short, however long its names are."""
    assert str(ObjectEvent("b", "k", event_name="Object Deleted")) == "Object Deleted about s3://b/k"
    assert len(str(ObjectEvent("b", "k" * 200_000, event_name="x" * 200_000))) < 2_000


def test_record_without_fields_does_not_hide_the_others() -> None:
    """In a notification, an unreadable record does not hide the others, and its reason is kept."""
    records = [record("ObjectCreated:Put", key="1"), {"eventName": "ObjectCreated:Put"}, 7]
    message = s3_events.parse_message(
        json.dumps({"Records": [*records, record("ObjectCreated:Put", key="2")]})
    )
    assert [event.key for event in message.events] == ["1", "2"]
    assert message.unreadable_reason == "not an S3 event notification: a record has no s3.object.key"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_json_in_any_member_is_parsed_or_unreadable(data: st.DataObject) -> None:
    """Any JSON value in any member of a message is parsed, or raises UnreadableMessageError."""
    events = [
        object_created_event("b", "k"),
        event_bridge("Object Created"),
        cloudtrail("PutObject"),
        {"Event": "s3:TestEvent"},
    ]
    event: Any = data.draw(st.sampled_from(events))
    container = event
    while isinstance(container, dict | list) and container:
        name = data.draw(
            st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container)))
        )
        if data.draw(st.booleans()) or not isinstance(container[name], dict | list):
            container[name] = data.draw(_JSON)
            break
        container = container[name]
    with suppress(s3_events.UnreadableMessageError):
        assert all(
            isinstance(notice.key, str) for notice in s3_events.parse_message(json.dumps(event)).events
        )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "not JSON"),
        ("text", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("[1, []]", "one of its events: not a JSON object"),
        ("[" * 900 + "]" * 900, "not a JSON object"),
        ("7", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "neither Records nor detail-type"),
        ({"Records": 1}, "neither Records nor detail-type"),
        ({"Records": []}, "neither Records nor detail-type"),
        ({"Records": [{}]}, "no eventName"),
        ({"Records": [{"eventName": "ObjectRemoved:Delete"}]}, "no s3.object.key"),
        ({"Records": [record("ObjectCreated:Put", key="%ff")]}, "not UTF-8"),
        ({"Type": "Notification", "Message": "hello"}, "not JSON"),
        ({"detail-type": "Object Created", "detail": {"bucket": "b"}}, "no detail.bucket.name"),
        ({"detail-type": 7}, "no detail-type"),
        (cloudtrail("DeleteObjects", key=None), "no detail.requestParameters.key"),
        (cloudtrail("PutObject", requestParameters=None), "no detail.requestParameters.bucketName"),
    ],
)
def test_message_in_no_known_format_is_unreadable(body: object, reason: str) -> None:
    """A message in no known format raises UnreadableMessageError with the reason."""
    with pytest.raises(s3_events.UnreadableMessageError, match=reason):
        s3_events.parse_message(body if isinstance(body, str) else json.dumps(body))
