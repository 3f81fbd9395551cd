"""All errors of the proxy. Only `rpc/` turns them into gRPC statuses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import grpc

from services.common.compat import override


class ProxyError(Exception):
    """Base of the errors that a caller of the proxy can receive."""


@dataclass(eq=False)
class InvalidRequestError(ProxyError):
    """The request breaks a limit. `field` is the path of the offending field, as in `batch[17].title`."""

    message: str
    field: str | None = None


class AccessDeniedError(ProxyError):
    """The caller has no access. Its request was not parsed."""


@dataclass(eq=False)
class UnauthenticatedError(AccessDeniedError):
    """The request carries no valid credentials of a caller."""

    message: str


@dataclass(eq=False)
class PermissionDeniedError(AccessDeniedError):
    """The caller is authenticated and is not allowed to call."""

    message: str


@dataclass(eq=False)
class QueueFullError(ProxyError):
    """Nothing was queued: the queue is full, or the expected wait exceeds the caller's deadline."""

    message: str
    retry_after_seconds: float


@dataclass(eq=False)
class QuotaExceededError(QueueFullError):
    """Nothing was queued: the caller has used up its quota, which all replicas share.

    `account` is the caller that the quota belongs to, empty for the quota that all unlisted callers share.
    `quota` is the name of the quota.
    """

    account: str
    quota: str


@dataclass(eq=False)
class DrainingError(ProxyError):
    """The proxy is shutting down. Another replica, or its successor, will answer."""

    retry_after_seconds: float = 1.0


@dataclass(eq=False)
class DeadlineExceededError(ProxyError):
    """The caller's deadline, or the maximum wait, passed before every pair was answered."""

    waited_seconds: float


class PairError(ProxyError):
    """Base of the reasons why one pair has no answer.

    A message that the model gave about a whole batch may quote every pair of the batch, and so pairs of other
    callers. Subclasses keep such a message in `batch_message`. `batch_request_id` is the one request to which
    all pairs of the batch belong, empty if there were several. All other fields may be shown to any caller.
    """

    def redacted_for(self, request_id: str) -> "PairError":  # noqa: ARG002 - a default for the subclasses
        """Return the error without what the given request must not read."""
        return self

    def redacted(self) -> "PairError":
        """Return the error without what only one request may read."""
        return self


@dataclass(eq=False)
class PairRejectedError(PairError):
    """The model rejected the pair as invalid.

    `field` is `.company`, `.title` or empty. `reason` is the model's description of this pair, empty if the
    model named no pair.
    """

    code: grpc.StatusCode
    message: str
    field: str = ""
    reason: str = ""
    batch_message: str = ""
    batch_request_id: str = ""

    @override
    def redacted_for(self, request_id: str) -> "PairRejectedError":
        message = (
            self.batch_message
            if self.batch_request_id and self.batch_request_id == request_id
            else self.message
        )
        return replace(self, message=message, batch_message="", batch_request_id="")

    @override
    def redacted(self) -> "PairRejectedError":
        return replace(self, batch_message="", batch_request_id="")


@dataclass(eq=False)
class InvalidModelResponseError(PairError):
    """The model's response has no valid level for the pair: missing, contradictory or out of range."""

    message: str


@dataclass(eq=False)
class ModelUnavailableError(PairError):
    """The model gave no answer in time."""

    message: str
    retry_after_seconds: float
    batch_message: str = ""
    batch_request_id: str = ""

    @override
    def redacted_for(self, request_id: str) -> "ModelUnavailableError":
        message = (
            self.batch_message
            if self.batch_request_id and self.batch_request_id == request_id
            else self.message
        )
        return replace(self, message=message, batch_message="", batch_request_id="")

    @override
    def redacted(self) -> "ModelUnavailableError":
        return replace(self, batch_message="", batch_request_id="")


@dataclass(eq=False)
class PairsFailedError(ProxyError):
    """Some pairs of a request failed, keyed by their index. The others were answered and cached."""

    failures: Mapping[int, PairError]


class ModelError(Exception):
    """Base of the reasons why a call to the model gave no answers."""


@dataclass(eq=False)
class BatchRejectedError(ModelError):
    """The model rejected the batch as invalid.

    `rejections` are the errors of the pairs that the model named, by their position in the batch. `message`
    may quote any pair of the batch.
    """

    code: grpc.StatusCode
    message: str
    rejections: Mapping[int, PairRejectedError]


@dataclass(eq=False)
class CallFailedError(ModelError):
    """The model was unreachable, overloaded, too slow or broken. The call may be repeated.

    `message` may quote any pair of the batch. `safe_message` does not: it may be logged and sent to any
    caller. `unsent` is true if the request never reached the model.
    """

    code: grpc.StatusCode
    message: str
    retry_after_seconds: float | None
    safe_message: str
    unsent: bool = False


class StoreError(Exception):
    """The store could not be reached, or failed an operation."""

    @property
    def kind(self) -> str:
        """Return the name of the underlying exception. Its message may hold data that must not be shown."""
        return type(self.__cause__ or self).__name__


class StoreRejectedError(StoreError):
    """The store answers but rejects the operation, for instance because it is out of memory or read-only."""


class StoreAccessDeniedError(StoreRejectedError):
    """Redis denies this replica a command, key or channel that it needs, or rejects its login.

    `command` is in lower case, `user` as configured, `reason` the error message of Redis.
    """

    def __init__(self, *, command: str, user: str, reason: str) -> None:
        super().__init__(f"Redis refuses user {user!r} the command {command!r}: {reason}")
        self.command = command
        self.user = user
        self.reason = reason


class StoreDamagedError(StoreError):
    """A script fails on data in Redis, and still did after the queue was reset."""


class QueueFormatError(StoreError):
    """The replicas that use the shared queue have another queue format than this one."""

    def __init__(self, *, found: int, expected: int) -> None:
        super().__init__(
            f"replicas of queue format {found} use the shared queue, and this replica has format {expected}"
        )
        self.found = found
        self.expected = expected
