"""Translate errors of S3 and SQS requests into the errors of a storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import ClientError
from botocore.handlers import validate_bucket_name

from services.common.aws_errors import CONNECTION_ERRORS, error_code, error_reason
from services.common.redaction import strip_userinfo
from services.common.storage.errors import FileArchivedError, FileMissingError, StorageError

_ERRORS_BY_CODE = {
    "NoSuchKey": FileMissingError,
    "404": FileMissingError,
    "InvalidObjectState": FileArchivedError,
}
_BAD_REQUEST = "bad request; see that the SSE-C key flags fit how the object is encrypted"


def allow_tenant_buckets(client: Any) -> None:
    """Let an S3 client send Ceph's bucket names `tenant:bucket`, which botocore rejects itself.

    https://docs.ceph.com/en/latest/radosgw/multitenancy/
    """
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Turn errors of the service and of the connection to it into StorageError with the address."""
    try:
        yield
    except ClientError as error:
        code = error_code(error)
        reason = _BAD_REQUEST if code == "400" else error_reason(error)
        raise _ERRORS_BY_CODE.get(code, StorageError)(uri=uri, reason=reason) from error
    except (*CONNECTION_ERRORS, RuntimeError) as error:
        # botocore raises RuntimeError when refreshed credentials have expired already.
        raise StorageError(uri=uri, reason=error_reason(error)) from error
    except ValueError as error:
        # A key that cannot be sent.
        raise StorageError(uri=uri, reason=strip_userinfo(str(error))) from error


def require_field(response: dict[str, Any], name: str, *, uri: str) -> Any:
    """Return a field of a response. Raises StorageError if it is missing."""
    if name not in response:
        raise StorageError(uri=uri, reason=f"the server's answer has no {name}")
    return response[name]
