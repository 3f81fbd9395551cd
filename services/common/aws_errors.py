"""Describe errors of botocore and of its connections in one line each."""

import os
import re
import ssl
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own name
    FlexibleChecksumError,
    HTTPClientError,
)

from services.common.redaction import strip_userinfo

_CREDENTIAL_OPERATIONS = ("AssumeRole", "GetRoleCredentials", "CreateToken", "GetSessionToken")
_REASONS_BY_CODE = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "does not exist",
    "404": "does not exist",
    "403": "access denied",
    "AWS.SimpleQueueService.NonExistentQueue": "the queue does not exist",
    "QueueDoesNotExist": "the queue does not exist",
}
CONNECTION_ERRORS: Final = (BotoCoreError, HTTPClientError, aiohttp.ClientError, TimeoutError, OSError)
"""The errors of a broken connection."""


def error_code(error: ClientError) -> str:
    """Return the service's own name for what went wrong, else the HTTP status."""
    response = error.response
    return str(
        response.get("Error", {}).get("Code")
        or response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    )


def error_reason(error: BaseException) -> str:
    """Return why a request failed, in one line without the request's own address."""
    if isinstance(error, ClientError):
        code = error_code(error)
        reason = _REASONS_BY_CODE.get(code) or error.response.get("Error", {}).get("Message") or code
        if error.operation_name.startswith(_CREDENTIAL_OPERATIONS):
            reason = f"{error.operation_name}: {reason}"
    elif isinstance(error, FlexibleChecksumError):
        reason = f"checksum mismatch: {error}"
    elif isinstance(error, (ConnectionError, HTTPClientError)):
        reason = _connection_reason(error)
    elif isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror}"
    elif isinstance(error, KeyError):
        reason = f"the answer has no {error}"
    else:
        reason = str(error)
    notes = getattr(error, "__notes__", ())
    return " ".join(strip_userinfo(": ".join([*notes, reason])).split()).rstrip(":") or type(error).__name__


def _connection_reason(error: BotoCoreError) -> str:
    details = error.kwargs
    url = urlsplit(str(details.get("endpoint_url", "")))
    cause = _cause_text(details.get("error") or error.__cause__ or error.__context__)
    if not url.netloc:
        return cause or str(error)
    return f"no answer from {url.scheme}://{url.netloc}: {cause or _spell_out(type(error).__name__)}"


def _cause_text(error: object) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message} (AWS_CA_BUNDLE names another CA)"
    # Its errno is not one of the operating system.
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, OSError) and error.errno:
        # A negative number is an error of a name lookup.
        known = os.strerror(error.errno) if error.errno > 0 else None
        return known or str(error.strerror)
    return str(error) if error else ""


def _spell_out(name: str) -> str:
    """Return a class name in words: `ReadTimeoutError` as `read timeout`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name.removesuffix("Error")).lower()
