"""The client of every bucket and queue, and what its errors are called here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import ClientError
from botocore.handlers import validate_bucket_name

from services.common.aws_client import open_client
from services.common.aws_errors import BROKEN, code_of, reason_of
from services.common.redaction import without_users
from services.common.storage.errors import ArchivedError, MissingError, StoreError

aws_client = open_client
_KINDS = {"NoSuchKey": MissingError, "404": MissingError, "InvalidObjectState": ArchivedError}
_BAD_REQUEST = "bad request; see that the SSE-C key flags fit how the object is encrypted"
__all__ = ["BROKEN", "aws_client", "code_of", "named", "required", "serve_tenants"]


def serve_tenants(client: Any) -> None:
    """Let an S3 client send bucket names of Ceph's form `tenant:bucket`, which botocore refuses itself.

    https://docs.ceph.com/en/latest/radosgw/multitenancy/
    """
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)


@contextmanager
def named(place: str) -> Iterator[None]:
    """Name the place in every error of the service or of the connection to it."""
    try:
        yield
    except ClientError as error:
        code = code_of(error)
        reason = _BAD_REQUEST if code == "400" else reason_of(error)
        raise _KINDS.get(code, StoreError)(place=place, reason=reason) from error
    except (*BROKEN, RuntimeError) as error:  # botocore's, for new credentials that have expired already
        raise StoreError(place=place, reason=reason_of(error)) from error
    except ValueError as error:  # a key that cannot be sent
        raise StoreError(place=place, reason=without_users(str(error))) from error


def required(answer: dict[str, Any], name: str, *, place: str) -> Any:
    """Return what an answer must have. Raises StoreError."""
    if name not in answer:
        raise StoreError(place=place, reason=f"the server's answer has no {name}")
    return answer[name]
