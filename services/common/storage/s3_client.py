"""The client of every bucket and queue, and what its errors are called here."""

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
    """Let an S3 client send bucket names of Ceph's form `tenant:bucket`, which botocore refuses itself.

    https://docs.ceph.com/en/latest/radosgw/multitenancy/
    """
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)


@contextmanager
def translate_errors(place: str) -> Iterator[None]:
    """Name the place in every error of the service or of the connection to it."""
    try:
        yield
    except ClientError as error:
        code = error_code(error)
        reason = _BAD_REQUEST if code == "400" else error_reason(error)
        raise _ERRORS_BY_CODE.get(code, StorageError)(uri=place, reason=reason) from error
    except (
        *CONNECTION_ERRORS,
        RuntimeError,
    ) as error:  # botocore's, for new credentials that have expired already
        raise StorageError(uri=place, reason=error_reason(error)) from error
    except ValueError as error:  # a key that cannot be sent
        raise StorageError(uri=place, reason=strip_userinfo(str(error))) from error


def require_field(answer: dict[str, Any], name: str, *, place: str) -> Any:
    """Return what an answer must have. Raises StoreError."""
    if name not in answer:
        raise StorageError(uri=place, reason=f"the server's answer has no {name}")
    return answer[name]
