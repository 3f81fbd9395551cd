"""Who calls, and with what priority: an interface, so that certificates and tokens can later answer it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from services.cache_proxy.errors import InvalidRequest
from services.cache_proxy.metrics import PRIORITIES

ANONYMOUS = "anonymous"
_MAX_NAME = 64
_REMEMBERED = 256

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller's name, for fairness and metrics, and the priority of this call."""

    name: str
    priority: str


class Identify(Protocol):
    """Says who calls. Raises `InvalidRequest`."""

    def __call__(self, metadata: Metadata) -> Caller:
        """The caller of an RPC with this metadata."""


def identify_by_metadata(metadata: Metadata) -> Caller:
    """Believe `x-caller`; a name that is empty, too long or not printable is `anonymous`."""
    name, priority = ANONYMOUS, PRIORITIES[0]
    for key, value in metadata:
        if key == "x-caller":
            name = str(value)
        elif key == "x-priority":
            priority = str(value)
    return _caller(name, priority)


@lru_cache(_REMEMBERED)
def _caller(name: str, priority: str) -> Caller:
    if priority not in PRIORITIES:
        message = f"x-priority: {priority[:_MAX_NAME]!r} is not one of {', '.join(PRIORITIES)}"
        raise InvalidRequest(message)
    usable = name.isprintable() and 0 < len(name) <= _MAX_NAME
    return Caller(name if usable else ANONYMOUS, priority)
