"""Identify the caller of an RPC and the priority of the call: the protocol, and the variant without proof."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from grpc import aio

from services.cache_proxy.domain import PRIORITIES
from services.cache_proxy.errors import InvalidRequestError

ANONYMOUS = "anonymous"
_MAX_NAME_LENGTH = 64
_MAX_QUOTED_LENGTH = 64
_CACHED_CALLERS = 256

Context = aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller's name, for fairness and metrics, and the priority of this call."""

    name: str
    priority: str


class Authenticator(Protocol):
    """Identify the caller of an RPC."""

    def __call__(self, context: Context) -> Caller:
        """Return the caller of the RPC. Raise `AccessDeniedError` or `InvalidRequestError`."""


def caller_from_metadata(context: Context) -> Caller:
    """Return the caller that `x-caller` names, `anonymous` if it is empty, too long or not printable.

    Raise `InvalidRequestError` if `x-priority` is unknown.
    """
    name = ANONYMOUS
    priority = PRIORITIES[0]
    for key, value in context.invocation_metadata() or ():
        if key == "x-caller":
            name = str(value)
        elif key == "x-priority":
            priority = str(value)
    return _unauthenticated_caller(name, priority)


def authenticated_caller(name: str, priority: str | None) -> Caller:
    """Return a caller whose name was proved. Raise `InvalidRequestError` if the priority is unknown."""
    return _validated_caller(name, PRIORITIES[0] if priority is None else priority)


@lru_cache(_CACHED_CALLERS)
def _unauthenticated_caller(name: str, priority: str) -> Caller:
    is_usable = name.isprintable() and 0 < len(name) <= _MAX_NAME_LENGTH
    return _validated_caller(name if is_usable else ANONYMOUS, priority)


def _validated_caller(name: str, priority: str) -> Caller:
    if priority not in PRIORITIES:
        message = f"x-priority: {priority[:_MAX_QUOTED_LENGTH]!r} is not one of {', '.join(PRIORITIES)}"
        raise InvalidRequestError(message)
    return Caller(name, priority)
