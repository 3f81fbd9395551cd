"""The client of every bucket and queue: its settings, and its errors in one line each."""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own name
    FlexibleChecksumError,
    HTTPClientError,
)

from services.common.credentials import without_users
from services.common.errors import CommandError

# Throttling, 5xx and broken connections: eight tries, up to 1, 2, 4 … 64 s between them, a minute on average.
# botocore's other modes share one allowance of a hundred retries among all requests: a burst uses it up.
_MAX_ATTEMPTS = 8
_CONNECT_TIMEOUT_SECONDS = 10
_READ_TIMEOUT_SECONDS = 60
_SILENCE_SECONDS = 4.0
_FAILING_SECONDS = 3.0
_AWS_HOST = re.compile(r"(.+\.)?(amazonaws\.com(\.cn)?|api\.aws|api\.amazonwebservices\.com\.cn)")
_SERVER_ERROR, _TOO_MANY = 500, 429
_CREDENTIAL_OPERATIONS = ("AssumeRole", "GetRoleCredentials", "CreateToken", "GetSessionToken")
_PLAIN_REASONS = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "does not exist",
    "404": "does not exist",
    "403": "access denied",
    "AWS.SimpleQueueService.NonExistentQueue": "the queue does not exist",
    "QueueDoesNotExist": "the queue does not exist",
}
BROKEN: Final = (BotoCoreError, HTTPClientError, aiohttp.ClientError, TimeoutError, OSError)
"""The errors of a broken connection."""
_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_client(
    service: str, *, endpoint_url: str | None = None, connections: int, region: str | None = None
) -> AsyncIterator[Any]:
    """Open a client with the usual AWS credentials and settings. Raises CommandError.

    What environment and profile say is kept: endpoint, addressing style, checksums, retries.
    """
    session: Any = get_session()  # type: ignore[no-untyped-call]
    _keep_library_logs_short()
    async with AsyncExitStack() as stack:
        try:
            making = session.create_client(
                service,
                endpoint_url=endpoint_url,
                region_name=region,
                config=AioConfig(
                    connect_timeout=_CONNECT_TIMEOUT_SECONDS,
                    read_timeout=_READ_TIMEOUT_SECONDS,
                    max_pool_connections=connections,
                    retries=_retries(session),
                ),
            )
            client = await stack.enter_async_context(making)
        except (*BROKEN, ClientError, RuntimeError, ValueError) as error:
            message = f"the {service.upper()} client: {reason_of(error)}"
            raise CommandError(message) from error
        _choose_checksums(session, client)
        client.meta.events.register_last("before-parameter-build", _validate_whole_objects_only)
        reachability = _Reachability(client)
        stack.callback(reachability.close)
        yield client


def code_of(error: ClientError) -> str:
    """Return the service's own name for what went wrong, else the HTTP status."""
    response = error.response
    return str(
        response.get("Error", {}).get("Code")
        or response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    )


def reason_of(error: BaseException) -> str:
    """Return why a request failed, in one line without the request's own address."""
    if isinstance(error, ClientError):
        code = code_of(error)
        reason = _PLAIN_REASONS.get(code) or error.response.get("Error", {}).get("Message") or code
        if error.operation_name.startswith(_CREDENTIAL_OPERATIONS):
            reason = f"credentials cannot be refreshed: {error.operation_name}: {reason}"
    elif isinstance(error, FlexibleChecksumError):
        reason = f"checksum mismatch: {error}"
    elif isinstance(error, (ConnectionError, HTTPClientError)):
        reason = _connection_reason(error)
    elif isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    else:
        reason = str(error)
    return " ".join(without_users(reason).split()) or type(error).__name__


def declares_checksums(client: Any) -> bool:
    """Return whether uploads carry a checksum that a multipart upload has to declare when it begins."""
    return bool(client.meta.config.request_checksum_calculation == "when_supported")


def _retries(session: Any) -> dict[str, Any]:
    """The mode is the environment's or the profile's (else `legacy`), and so is the number of attempts."""
    given = session.get_config_variable("max_attempts")
    return {"total_max_attempts": _MAX_ATTEMPTS if given is None else given}


def _choose_checksums(session: Any, client: Any) -> None:
    """Send no checksum unasked to a server that is not AWS's.

    By https, botocore sends it behind a body in `aws-chunked` framing. Some servers store the framing as the
    object's content (boto/boto3#4435), others refuse the header. Which server it is, the client knows once it
    is made: the endpoint may be in a flag, in variables, or in the profile.
    """
    if client.meta.service_model.service_name != "s3" or _is_aws(client.meta.endpoint_url):
        return
    in_profile = "request_checksum_calculation" in session.get_scoped_config()
    if not in_profile and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        client.meta.config.request_checksum_calculation = "when_required"


def _is_aws(endpoint_url: str) -> bool:
    return _AWS_HOST.fullmatch(urlsplit(endpoint_url).hostname or "") is not None


def _validate_whole_objects_only(params: dict[str, Any], model: Any, **_: object) -> None:
    """Some servers send the whole object's checksum with a part of it (ceph/ceph#61901).

    Behind botocore's own handler of this event, which asks for the checksum.
    """
    if model.name == "GetObject" and "Range" in params:
        params.pop("ChecksumMode", None)


def _connection_reason(error: BotoCoreError) -> str:
    details = error.kwargs
    url = urlsplit(str(details.get("endpoint_url", "")))
    cause = _cause(details.get("error") or error.__cause__ or error.__context__)
    if not url.netloc:
        return cause or str(error)
    return f"no answer from {url.scheme}://{url.netloc}: {cause or _words(type(error).__name__)}"


def _cause(error: object) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and error.errno:
        known = os.strerror(error.errno) if error.errno > 0 else None  # negative: of a look-up of a name
        return known or str(error.strerror)
    return str(error) if error else ""


def _words(name: str) -> str:
    """`ReadTimeoutError` as `read timeout`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name.removesuffix("Error")).lower()


class _Reachability:
    """Logs once when the endpoint stops answering, and once when it answers again.

    A request is tried for minutes; without this line nobody knows what a run is waiting for.

    State: `_answered` (ever), `_failing_since` (the first failure since the last answer), `_is_down` (it was
    logged), `_timer` (until the very first answer).
    """

    def __init__(self, client: Any) -> None:
        self._endpoint = without_users(client.meta.endpoint_url)
        self._max_attempts = client.meta.config.retries.get("total_max_attempts")
        self._answered = False
        self._failing_since: float | None = None
        self._is_down = False
        self._timer: asyncio.TimerHandle | None = None
        service = client.meta.service_model.service_id.hyphenize()
        client.meta.events.register(f"before-send.{service}", self._sending)
        client.meta.events.register(f"response-received.{service}", self._received)

    def close(self) -> None:
        """Stop waiting for the first answer."""
        if self._timer:
            self._timer.cancel()

    def _sending(self, **_: object) -> None:
        if not self._answered and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_SILENCE_SECONDS, self._silent)

    def _silent(self) -> None:
        if not self._answered:
            self._note_down(f"no answer from {self._endpoint} for {_SILENCE_SECONDS:.0f} s; waiting")

    def _received(
        self, *, response_dict: Any, context: Any, exception: BaseException | None = None, **_: object
    ) -> None:
        status = response_dict["status_code"] if response_dict else 0
        if exception is None and status < _SERVER_ERROR and status != _TOO_MANY:
            self._note_answer()
            return
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        attempt = context.get("retries", {}).get("attempt", 1)
        is_last = self._max_attempts is not None and attempt >= self._max_attempts
        unreachable = isinstance(exception, ConnectionError) and not self._answered
        if is_last or not (unreachable or now - self._failing_since >= _FAILING_SECONDS):
            return
        why = reason_of(exception) if exception else f"{self._endpoint} answered {status}"
        limit = f" of {self._max_attempts}" if self._max_attempts else ""
        self._note_down(f"{why}; retrying (attempt {attempt}{limit}; AWS_MAX_ATTEMPTS sets the limit)")

    def _note_down(self, message: str) -> None:
        if not self._is_down:
            _log.warning("%s", message)
        self._is_down = True

    def _note_answer(self) -> None:
        self.close()
        self._answered = True
        self._failing_since = None
        if self._is_down:
            _log.warning("%s answers again", self._endpoint)
        self._is_down = False


def _keep_library_logs_short() -> None:
    """Log why credentials could not be refreshed in one line, without the library's own stack."""
    for name in ("botocore", "aiobotocore"):
        for module in ("credentials", "tokens", "utils"):
            logger = logging.getLogger(f"{name}.{module}")
            if _in_one_line not in logger.filters:
                logger.addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and not logging.getLogger().isEnabledFor(logging.DEBUG):
        record.msg, record.args = f"{record.getMessage().rstrip('.')}: {reason_of(error)}", ()
        record.exc_info = None
    return True
