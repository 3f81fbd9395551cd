"""What may be told in a log of why a call failed."""

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
    """A failed call's details if they are gRPC's own, cut short; of what a server says, nothing."""
    return (details or "")[:_MAX_CHARACTERS] if _CORE_MESSAGES.match(details or "") else ""


def is_connection_failure(details: str | None) -> bool:
    """Return whether gRPC itself says that there was no connection to send the call on."""
    return _CONNECTION_FAILURES.match(details or "") is not None


def format_status(code: str, details: str | None) -> str:
    """The status in a line of a log: its code, and gRPC's own words."""
    words = safe_details(details)
    return f"{code}: {words}" if words else code
