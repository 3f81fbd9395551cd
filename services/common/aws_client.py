"""Open clients of S3 and SQS with the settings that every client here has."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from services.common.aws_credential_logs import shorten_credential_logs
from services.common.aws_errors import CONNECTION_ERRORS, error_reason
from services.common.aws_reachability import EndpointMonitor
from services.common.errors import CommandError

# For throttling, 5xx and broken connections: eight attempts, up to 1, 2, 4 … 64 s between them, a minute on
# average. botocore's other modes share one allowance of a hundred retries among all requests: a burst uses
# it up.
_MAX_ATTEMPTS = 8
_CONNECT_TIMEOUT_SECONDS = 10
_READ_TIMEOUT_SECONDS = 60


@asynccontextmanager
async def open_client(
    service: str, *, endpoint_url: str | None = None, max_connections: int, region: str | None = None
) -> AsyncIterator[Any]:
    """Open a client with the usual AWS credentials. Raises CommandError.

    Settings of environment and profile take precedence: endpoint, addressing style, checksums, retries.
    """
    session: Any = get_session()  # type: ignore[no-untyped-call]
    shorten_credential_logs()
    async with AsyncExitStack() as stack:
        try:
            config = AioConfig(
                connect_timeout=_CONNECT_TIMEOUT_SECONDS,
                read_timeout=_READ_TIMEOUT_SECONDS,
                max_pool_connections=max_connections,
                retries=_retry_config(session),
            )
            await _load_credentials(session)
            making = session.create_client(
                service, endpoint_url=endpoint_url, region_name=region, config=config
            )
            client = await stack.enter_async_context(making)
        except (*CONNECTION_ERRORS, RuntimeError, ValueError) as error:
            message = f"the {service.upper()} client: {error_reason(error)}"
            raise CommandError(message) from error
        _configure_checksums(session, client)
        client.meta.events.register_last("before-parameter-build", _skip_checksum_of_ranges)
        reachability = EndpointMonitor(client)
        stack.callback(reachability.close)
        yield client


def declares_checksums(client: Any) -> bool:
    """Return whether uploads carry a checksum that a multipart upload has to declare when it begins."""
    return bool(client.meta.config.request_checksum_calculation == "when_supported")


def _retry_config(session: Any) -> dict[str, Any]:
    """Return the retry settings. Mode and number of attempts may come from environment or profile."""
    try:
        given = session.get_config_variable("max_attempts")
    except ValueError as error:
        error.add_note("AWS_MAX_ATTEMPTS")
        raise
    return {"total_max_attempts": _MAX_ATTEMPTS if given is None else given}


async def _load_credentials(session: Any) -> None:
    """Load the credentials before the client does, so that an error can be reported as theirs."""
    try:
        await session.get_credentials()
    except Exception as error:
        error.add_note("credentials")
        if not isinstance(
            error, (*CONNECTION_ERRORS, RuntimeError, ValueError)
        ):  # of files and commands of any form
            raise CommandError(error_reason(error)) from error
        raise


def _configure_checksums(session: Any, client: Any) -> None:
    """Send checksums by default only to AWS.

    Over https, botocore appends the checksum to the body in `aws-chunked` framing. Some servers store the
    framing as the content of the object (boto/boto3#4435), others reject the header. The endpoint is known
    only once the client exists: it may be in a flag, in variables, or in the profile.
    """
    if client.meta.service_model.service_name != "s3" or _is_aws_endpoint(session, client.meta.endpoint_url):
        return
    in_profile = "request_checksum_calculation" in session.get_scoped_config()
    if not in_profile and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        client.meta.config.request_checksum_calculation = "when_required"


def _is_aws_endpoint(session: Any, endpoint_url: str) -> bool:
    host = urlsplit(endpoint_url).hostname or ""
    outputs = [partition["outputs"] for partition in session.get_data("partitions")["partitions"]]
    suffixes = {
        each[name] for each in outputs for name in ("dnsSuffix", "dualStackDnsSuffix") if name in each
    }
    return any(f".{host}".endswith(f".{suffix}") for suffix in suffixes)


def _skip_checksum_of_ranges(params: dict[str, Any], model: Any, **_: object) -> None:
    """Request no checksum with a range: some servers send that of the whole object (ceph/ceph#61901).

    Runs after botocore's own handler of this event, which requests the checksum.
    """
    if model.name == "GetObject" and "Range" in params:
        params.pop("ChecksumMode", None)
