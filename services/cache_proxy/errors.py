"""Every way in which a pair or an RPC can fail; the servicer alone makes statuses of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import grpc


class ProxyError(Exception):
    """The base of what a caller of the proxy may be told."""


@dataclass(eq=False)
class InvalidRequestError(ProxyError):
    """The request breaks a bound; `field` names the place, as in `batch[17].title`."""

    message: str
    field: str | None = None


class AccessDeniedError(ProxyError):
    """The caller is not let in; its request was not looked at."""


@dataclass(eq=False)
class UnauthenticatedError(AccessDeniedError):
    """Nothing says who calls, or not in a way that is believed here."""

    message: str


@dataclass(eq=False)
class PermissionDeniedError(AccessDeniedError):
    """It is known who calls, and that they may not."""

    message: str


@dataclass(eq=False)
class QueueFullError(ProxyError):
    """Nothing was queued: there is no room, or no turn before the caller's deadline."""

    message: str
    retry_after_seconds: float


@dataclass(eq=False)
class QuotaExceededError(QueueFullError):
    """Nothing was queued: the caller has as much as its quota allows, of all replicas together.

    `account` is whose quota it is, empty for that of all who have none of their own; `quota` is its name.
    """

    account: str
    quota: str


@dataclass(eq=False)
class DrainingError(ProxyError):
    """The proxy is about to end; another replica, or its successor, will answer."""

    retry_after_seconds: float = 1.0


@dataclass(eq=False)
class DeadlineExceededError(ProxyError):
    """The caller's deadline, or the longest wait, passed before every pair was answered."""

    waited_seconds: float


class PairError(ProxyError):
    """Why one pair has no answer.

    A message that the model gave about a whole batch may quote every pair of it. An error has it in `words`,
    and `words_for` is the one request to which all pairs of the batch belong. Every caller may read the rest.
    """

    def redacted_for(self, request_id: str) -> "PairError":  # noqa: ARG002 - most errors have no words of the model
        """Return the error as the request may read it."""
        return self

    def redacted(self) -> "PairError":
        """Return the error as every caller of the pair may read it."""
        return self


@dataclass(eq=False)
class PairRejectedError(PairError):
    """The model called the pair invalid; `field` is `.company`, `.title` or empty.

    `reason` is the model's description of this very pair, if it named it.
    """

    code: grpc.StatusCode
    message: str
    field: str = ""
    reason: str = ""
    batch_message: str = ""
    batch_request_id: str = ""

    def redacted_for(self, request_id: str) -> "PairRejectedError":
        """See `PairError.told_to`."""
        message = (
            self.batch_message
            if self.batch_request_id and self.batch_request_id == request_id
            else self.message
        )
        return replace(self, message=message, batch_message="", batch_request_id="")

    def redacted(self) -> "PairRejectedError":
        """See `PairError.told_to_anyone`."""
        return replace(self, batch_message="", batch_request_id="")


@dataclass(eq=False)
class InvalidModelResponseError(PairError):
    """The model's answer for the pair was none: missing, twice and different, or out of range."""

    message: str


@dataclass(eq=False)
class ModelUnavailableError(PairError):
    """The model answered nothing in time."""

    message: str
    retry_after_seconds: float
    batch_message: str = ""
    batch_request_id: str = ""

    def redacted_for(self, request_id: str) -> "ModelUnavailableError":
        """See `PairError.told_to`."""
        message = (
            self.batch_message
            if self.batch_request_id and self.batch_request_id == request_id
            else self.message
        )
        return replace(self, message=message, batch_message="", batch_request_id="")

    def redacted(self) -> "ModelUnavailableError":
        """See `PairError.told_to_anyone`."""
        return replace(self, batch_message="", batch_request_id="")


@dataclass(eq=False)
class PairsFailedError(ProxyError):
    """Some pairs of a request failed, by their index; the others were answered and cached."""

    failures: Mapping[int, PairError]


class ModelError(Exception):
    """Why a call to the model gave no answers."""


@dataclass(eq=False)
class BatchRejectedError(ModelError):
    """The model called the batch invalid; `named` has the reasons of the pairs it named, by position.

    `message` may quote any pair of the batch.
    """

    code: grpc.StatusCode
    message: str
    rejections: Mapping[int, PairRejectedError]


@dataclass(eq=False)
class CallFailedError(ModelError):
    """The model was unreachable, overloaded, too slow or broken; the call may be repeated.

    `message` may quote any pair of the batch. `told` does not: it is for the log and for every caller.
    `unsent`: the model never got the call.
    """

    code: grpc.StatusCode
    message: str
    retry_after_seconds: float | None
    safe_message: str
    unsent: bool = False


class StoreError(Exception):
    """The store could not be reached, or would not do what it was asked."""

    @property
    def kind(self) -> str:
        """What the client or the server called it: no more of it is for everybody's eyes."""
        return type(self.__cause__ or self).__name__


class StoreRejectedError(StoreError):
    """The store answers, but not this: out of memory, read-only."""


class StoreAccessDeniedError(StoreRejectedError):
    """Redis refuses this replica a command, key or channel that it needs, or refuses its login.

    `command` in lower case; `user` as configured; `reason` in Redis's words.
    """

    def __init__(self, *, command: str, user: str, reason: str) -> None:
        super().__init__(f"Redis refuses user {user!r} the command {command!r}: {reason}")
        self.command = command
        self.user = user
        self.reason = reason


class StoreDamagedError(StoreError):
    """A script fails over data in Redis, and still did after the queue was made anew."""


class QueueFormatError(StoreError):
    """The replicas that use the shared queue have another queue format than this one."""

    def __init__(self, *, found: int, expected: int) -> None:
        super().__init__(
            f"replicas of queue format {found} use the shared queue, and this replica has format {expected}"
        )
        self.found = found
        self.expected = expected
