"""A scripted SQS server for faults that other stand-ins cannot produce. It has a single message."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ScriptedSqs:
    """A running server.

    State: `calls`, the number of requests by operation, and `received`, whether the message was delivered;
    both guarded by `_lock`.
    """

    body: str
    visible_seconds: int | None
    failing: Mapping[str, str]
    endpoint_url: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    received: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, operation: str) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of the response to one request."""
        with self._lock:
            self.calls[operation] += 1
            if operation in self.failing:
                code = self.failing[operation]
                return 400, {"__type": f"com.amazonaws.sqs#{code}", "message": f"{code} it is"}
            if operation == "GetQueueAttributes" and self.visible_seconds is not None:
                return 200, {"Attributes": {"VisibilityTimeout": str(self.visible_seconds)}}
            if operation == "ReceiveMessage" and not self.received:
                self.received = True
                message = {"MessageId": "the-message", "ReceiptHandle": "r", "Body": self.body}
                return 200, {"Messages": [message]}
            return 200, {}


@contextmanager
def scripted_sqs(
    body: object, *, visible_seconds: int | None, failing: Mapping[str, str]
) -> Iterator[ScriptedSqs]:
    """Run a server whose message has this body.

    `failing` has the error code of each operation that always fails. `visible_seconds` is None for a server
    without queue attributes.
    """
    script = ScriptedSqs(json.dumps(body), visible_seconds, failing)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = script.answer(self.headers["X-Amz-Target"].rpartition(".")[2])
            data = json.dumps(answer).encode()
            self.send_response(status)
            if status != 200:
                # AWS also sends the error code of the older query protocol.
                code = answer["__type"].rpartition("#")[2]
                self.send_header("x-amzn-query-error", f"AWS.SimpleQueueService.{code};Sender")
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Log nothing: tests read `calls`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.endpoint_url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
