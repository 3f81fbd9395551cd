"""The client of every bucket and queue, and what its errors are called here."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Final

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.handlers import validate_bucket_name

from services.augmenter.errors import ArchivedError, MissingError, StoreError
from services.common.credentials import without_users

# Throttling, 5xx and broken connections: eight tries, up to 1, 2, 4 … 64 s between them, a minute on average.
# botocore's other modes share one allowance of a hundred retries among all requests: a burst uses it up.
_TRIES = 8
_PLAIN_REASONS = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "does not exist",
    "404": "does not exist",
    "400": "bad request; see that the SSE-C key flags fit how the object is encrypted",
    "403": "access denied",
    "AWS.SimpleQueueService.NonExistentQueue": "the queue does not exist",
    "QueueDoesNotExist": "the queue does not exist",
}
_KINDS = {"NoSuchKey": MissingError, "404": MissingError, "InvalidObjectState": ArchivedError}
BROKEN: Final = (BotoCoreError, HTTPClientError, aiohttp.ClientError, TimeoutError, OSError)
"""What comes of a way to the server that broke."""


@asynccontextmanager
async def aws_client(
    service: str, *, endpoint_url: str | None = None, region: str | None = None, connections: int
) -> AsyncIterator[Any]:
    """A client with the usual AWS credentials; an S3 endpoint of one's own is addressed by path.

    Raises StoreError for settings that no client can be made of.
    """
    config = AioConfig(
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        retries={"mode": "legacy", "total_max_attempts": _TRIES},
        s3={"addressing_style": "path"} if endpoint_url else None,
    )
    session: Any = get_session()  # type: ignore[no-untyped-call]
    async with AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(
                session.create_client(service, region_name=region, endpoint_url=endpoint_url, config=config)
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(
                place=f"the {service.upper()} client", reason=without_users(str(error))
            ) from error
        yield client


def serve_tenants(client: Any) -> None:
    """Let an S3 client send bucket names of Ceph's form `tenant:bucket`, which botocore refuses itself.

    https://docs.ceph.com/en/latest/radosgw/multitenancy/
    """
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)


def code_of(error: ClientError) -> str:
    """The service's own name for what went wrong, else the HTTP status."""
    response = error.response
    return str(
        response.get("Error", {}).get("Code")
        or response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
    )


@contextmanager
def named(place: str) -> Iterator[None]:
    """Name the place in every error of the service or of the way to it."""
    try:
        yield
    except ClientError as error:
        code = code_of(error)
        reason = error.response.get("Error", {}).get("Message") or code
        raise _KINDS.get(code, StoreError)(place=place, reason=_PLAIN_REASONS.get(code, reason)) from error
    except BROKEN as error:
        raise StoreError(place=place, reason=without_users(str(error)) or type(error).__name__) from error
    except ValueError as error:  # a key that cannot be sent
        raise StoreError(place=place, reason=without_users(str(error))) from error
