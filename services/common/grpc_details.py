"""Decide which status details of a failed call are safe to log."""

import re

# How gRPC's own sentences begin: what could not be reached, and why. Whatever else comes from a server, and
# may quote a company or a title.
_CORE_MESSAGES = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|DNS resolution failed|"
    r"Deadline Exceeded$|Socket closed$|recvmsg:|Connection reset|GOAWAY received|Stream removed|"
    r"Received message larger than max|Sent message larger than max"
)
_CONNECTION_FAILURES = re.compile(
    "failed to connect to all addresses|connections to all backends failing|DNS resolution failed"
)
_MAX_CHARACTERS = 300


def safe_details(details: str | None) -> str:
    """Return the details of a failed call if gRPC itself wrote them, truncated, else ""."""
    return (details or "")[:_MAX_CHARACTERS] if _CORE_MESSAGES.match(details or "") else ""


def is_connection_failure(details: str | None) -> bool:
    """Return whether gRPC itself reports that it had no connection to send the call."""
    return _CONNECTION_FAILURES.match(details or "") is not None


def format_status(code: str, details: str | None) -> str:
    """Return a status for a log line: its code, and gRPC's own details."""
    words = safe_details(details)
    return f"{code}: {words}" if words else code
