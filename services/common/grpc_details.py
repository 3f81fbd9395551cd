"""What may be told in a log of why a call failed."""

import re

# How gRPC's own sentences begin: what could not be reached, and why. Whatever else comes from a server, and
# may quote a company or a title.
_OWN = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|DNS resolution failed|"
    r"Deadline Exceeded$|Socket closed$|recvmsg:|Connection reset|GOAWAY received|Stream removed|"
    r"Received message larger than max|Sent message larger than max"
)
_NO_CONNECTION = re.compile(
    "failed to connect to all addresses|connections to all backends failing|DNS resolution failed"
)
_MOST = 300


def own_words(details: str | None) -> str:
    """A failed call's details if they are gRPC's own, cut short; of what a server says, nothing."""
    return (details or "")[:_MOST] if _OWN.match(details or "") else ""


def never_sent(details: str | None) -> bool:
    """Return whether gRPC itself says that there was no connection to send the call on."""
    return _NO_CONNECTION.match(details or "") is not None


def answered(code: str, details: str | None) -> str:
    """The status in a line of a log: its code, and gRPC's own words."""
    words = own_words(details)
    return f"{code}: {words}" if words else code
