"""Every way in which a pair or an RPC can fail; the servicer alone makes statuses of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


class ProxyError(Exception):
    """The base of what a caller of the proxy may be told."""


@dataclass(eq=False)
class InvalidRequest(ProxyError):
    """The request breaks a bound; `field` names the place, as in `batch[17].title`."""

    message: str
    field: str | None = None


class AccessRefused(ProxyError):
    """The caller is not let in; its request was not looked at."""


@dataclass(eq=False)
class Unauthenticated(AccessRefused):
    """Nothing says who calls, or not in a way that is believed here."""

    message: str


@dataclass(eq=False)
class Forbidden(AccessRefused):
    """It is known who calls, and that they may not."""

    message: str


@dataclass(eq=False)
class QueueFull(ProxyError):
    """Nothing was queued: there is no room, or no turn before the caller's deadline."""

    message: str
    retry_after_seconds: float


@dataclass(eq=False)
class OverQuota(QueueFull):
    """Nothing was queued: the caller has as much as its quota allows, of all replicas together.

    `account` is whose quota it is, empty for that of all who have none of their own; `quota` is its name.
    """

    account: str
    quota: str


@dataclass(eq=False)
class Draining(ProxyError):
    """The proxy is about to end; another replica, or its successor, will answer."""

    retry_after_seconds: float = 1.0


@dataclass(eq=False)
class DeadlinePassed(ProxyError):
    """The caller's deadline, or the longest wait, passed before every pair was answered."""

    waited_seconds: float


class PairError(ProxyError):
    """Why one pair has no answer."""


@dataclass(eq=False)
class Refused(PairError):
    """The model called the pair invalid, in these words; `field` is `.company`, `.title` or empty.

    `reason` is what the model said of this very pair, if it named it.
    """

    code: grpc.StatusCode
    message: str
    field: str = ""
    reason: str = ""


@dataclass(eq=False)
class Nonsense(PairError):
    """The model's answer for the pair was none: missing, twice and different, or out of range."""

    message: str


@dataclass(eq=False)
class Unavailable(PairError):
    """The model could not be asked, after retries."""

    message: str
    retry_after_seconds: float


@dataclass(eq=False)
class PairsFailed(ProxyError):
    """Some pairs of a request failed, by their index; the others were answered and cached."""

    failures: Mapping[int, PairError]


class ModelError(Exception):
    """Why a call to the model gave no answers."""


@dataclass(eq=False)
class BatchRefused(ModelError):
    """The model called the batch invalid; `named` has the reasons of the pairs it named, by position."""

    code: grpc.StatusCode
    message: str
    named: Mapping[int, Refused]


@dataclass(eq=False)
class CallFailed(ModelError):
    """The model was unreachable, overloaded, too slow or broken; the call may be repeated.

    `message` is for callers, and may hold what the model says; `told` is for the log, and does not.
    """

    code: grpc.StatusCode
    message: str
    retry_after_seconds: float | None
    told: str


class StoreError(Exception):
    """The store could not be reached, or would not do what it was asked."""

    @property
    def kind(self) -> str:
        """What the client or the server called it: no more of it is for everybody's eyes."""
        return type(self.__cause__ or self).__name__


class StoreRefused(StoreError):
    """The store answers, but not this: out of memory, read-only."""
