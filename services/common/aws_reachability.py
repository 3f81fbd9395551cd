"""Log when an endpoint stops responding, and when it responds again."""

import asyncio
import logging
import time
from typing import Any

from botocore.exceptions import ConnectionError  # noqa: A004 - botocore's own name

from services.common.aws_errors import error_reason
from services.common.redaction import strip_userinfo

# With the start of the process, the line is logged within 5 s.
_FIRST_RESPONSE_SECONDS = 3.0
_FAILURE_SECONDS = 3.0
_SERVER_ERROR = 500
_TOO_MANY_REQUESTS = 429
_log = logging.getLogger(__name__)


class EndpointMonitor:
    """Logs once when the endpoint stops responding, and once when it responds again.

    A request is retried for minutes. Without this line a user could not see what a run is waiting for.

    State: `_has_sent` and `_has_response` (since the start), `_failing_since` (the first failure since the
    last response), `_is_down` (was logged), `_timer` (until the first response).
    """

    def __init__(self, client: Any) -> None:
        self._endpoint = strip_userinfo(client.meta.endpoint_url)
        self._max_attempts = client.meta.config.retries.get("total_max_attempts")
        self._has_sent = False
        self._has_response = False
        self._failing_since: float | None = None
        self._is_down = False
        self._timer: asyncio.TimerHandle | None = None
        service = client.meta.service_model.service_id.hyphenize()
        client.meta.events.register_first(f"request-created.{service}", self._on_request_created)
        client.meta.events.register(f"before-send.{service}", self._on_before_send)
        client.meta.events.register(f"response-received.{service}", self._on_response)

    def close(self) -> None:
        """Stop waiting for the first answer."""
        if self._timer:
            self._timer.cancel()

    def _on_request_created(self, **_: object) -> None:
        """Start the timer before a request is signed, which may have to fetch credentials first."""
        if not self._has_response and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_FIRST_RESPONSE_SECONDS, self._on_no_response)

    def _on_before_send(self, **_: object) -> None:
        self._has_sent = True

    def _on_no_response(self) -> None:
        if not self._has_response:
            what = "no answer from" if self._has_sent else "no credentials for"
            self._report_down(f"{what} {self._endpoint} for {_FIRST_RESPONSE_SECONDS:.0f} s; waiting")

    def _on_response(
        self, *, response_dict: Any, context: Any, exception: BaseException | None = None, **_: object
    ) -> None:
        status = response_dict["status_code"] if response_dict else 0
        if exception is None and status < _SERVER_ERROR and status != _TOO_MANY_REQUESTS:
            self._report_up()
            return
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        attempt = context.get("retries", {}).get("attempt", 1)
        is_last = self._max_attempts is not None and attempt >= self._max_attempts
        unreachable = isinstance(exception, ConnectionError) and not self._has_response
        if is_last or not (unreachable or now - self._failing_since >= _FAILURE_SECONDS):
            return
        why = error_reason(exception) if exception else f"{self._endpoint} answered {status}"
        limit = f" of {self._max_attempts}" if self._max_attempts else ""
        self._report_down(f"{why}; retrying (attempt {attempt}{limit}; AWS_MAX_ATTEMPTS sets the limit)")

    def _report_down(self, message: str) -> None:
        if not self._is_down:
            _log.warning("%s", message)
        self._is_down = True

    def _report_up(self) -> None:
        self.close()
        self._has_response = True
        self._failing_since = None
        if self._is_down:
            _log.warning("%s answers again", self._endpoint)
        self._is_down = False
