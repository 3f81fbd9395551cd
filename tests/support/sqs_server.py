"""A real SQS-compatible server for tests: moto's, of which only the queues are used."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

_READY_SECONDS = 30


class SqsQueue:
    """A queue and its dead-letter queue."""

    def __init__(self, client: Any, name: str, *, visible_seconds: int, receives: int = 10) -> None:
        self._client = client
        self.dead_letter_url = client.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
        dead = client.get_queue_attributes(QueueUrl=self.dead_letter_url, AttributeNames=["QueueArn"])
        redrive = {"deadLetterTargetArn": dead["Attributes"]["QueueArn"], "maxReceiveCount": receives}
        self.url: str = client.create_queue(
            QueueName=name,
            Attributes={"VisibilityTimeout": str(visible_seconds), "RedrivePolicy": json.dumps(redrive)},
        )["QueueUrl"]

    def send(self, body: object) -> None:
        """Send a message: a string unchanged, anything else as JSON."""
        self._client.send_message(
            QueueUrl=self.url, MessageBody=body if isinstance(body, str) else json.dumps(body)
        )

    def count(self, url: str | None = None) -> int:
        """Return the number of messages in this or another queue, visible and invisible."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        got = self._client.get_queue_attributes(QueueUrl=url or self.url, AttributeNames=names)
        return sum(int(got["Attributes"][name]) for name in names)

    @property
    def visible_count(self) -> int:
        """Return the number of visible messages."""
        name = "ApproximateNumberOfMessages"
        got = self._client.get_queue_attributes(QueueUrl=self.url, AttributeNames=[name])
        return int(got["Attributes"][name])


def object_created_event(bucket: str, *keys: str) -> dict[str, Any]:
    """Return the event notification that S3 sends for created objects. Keys are given as S3 encodes them."""
    return {
        "Records": [
            {
                "eventSource": "aws:s3",
                "eventName": "ObjectCreated:Put",
                "s3": {"bucket": {"name": bucket}, "object": {"key": key}},
            }
            for key in keys
        ]
    }


class SqsServer:
    """The server's URL and its credentials."""

    def __init__(self, endpoint_url: str, environment: dict[str, str]) -> None:
        self.endpoint_url = endpoint_url
        self._environment = environment

    def create_queue(
        self, name: str, *, visible_seconds: int = 30, receives: int = 10, region: str | None = None
    ) -> SqsQueue:
        """Create a queue in the environment's region or in another one."""
        client: Any = boto3.client(  # type: ignore[no-untyped-call]
            "sqs",
            endpoint_url=self.endpoint_url,
            region_name=region or self._environment["AWS_DEFAULT_REGION"],
            aws_access_key_id=self._environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self._environment["AWS_SECRET_ACCESS_KEY"],
        )
        return SqsQueue(client, name, visible_seconds=visible_seconds, receives=receives)


@contextmanager
def sqs_server(folder: Path, environment: dict[str, str]) -> Iterator[SqsServer]:
    """Run a server that accepts the credentials in `environment`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield SqsServer(f"http://127.0.0.1:{port}", environment)
    finally:
        process.kill()
        process.wait()
