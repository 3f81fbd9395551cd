"""The client of buckets and queues, and the translation of its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import ClientError
from botocore.handlers import validate_bucket_name

from services.common.aws_client import open_client
from services.common.aws_errors import CONNECTION_ERRORS, error_code, error_reason
from services.common.redaction import strip_userinfo
from services.common.storage.errors import FileArchivedError, FileMissingError, StorageError

aws_client = open_client
_ERRORS_BY_CODE = {
    "NoSuchKey": FileMissingError,
    "404": FileMissingError,
    "InvalidObjectState": FileArchivedError,
}
_BAD_REQUEST = "bad request; see that the SSE-C key flags fit how the object is encrypted"
__all__ = [
    "CONNECTION_ERRORS",
    "allow_tenant_buckets",
    "aws_client",
    "error_code",
    "require_field",
    "translate_errors",
]


def allow_tenant_buckets(client: Any) -> None:
    """Allow bucket names of Ceph's form `tenant:bucket` in a client, which botocore would reject.

    https://docs.ceph.com/en/latest/radosgw/multitenancy/
    """
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Translate errors of the service, or of the connection to it, to StorageError with the URI."""
    try:
        yield
    except ClientError as error:
        code = error_code(error)
        reason = _BAD_REQUEST if code == "400" else error_reason(error)
        raise _ERRORS_BY_CODE.get(code, StorageError)(uri=uri, reason=reason) from error
    except (*CONNECTION_ERRORS, RuntimeError) as error:
        # botocore raises RuntimeError for new credentials that have expired already.
        raise StorageError(uri=uri, reason=error_reason(error)) from error
    except ValueError as error:
        # The key cannot be sent.
        raise StorageError(uri=uri, reason=strip_userinfo(str(error))) from error


def require_field(response: dict[str, Any], name: str, *, uri: str) -> Any:
    """Return a field that a response must have. Raises StorageError."""
    if name not in response:
        raise StorageError(uri=uri, reason=f"the server's answer has no {name}")
    return response[name]
