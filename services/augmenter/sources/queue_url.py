"""Derives region and endpoint of an SQS queue from its URL. No network access.

https://docs.aws.amazon.com/general/latest/gr/sqs-service.html lists the hosts.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from services.common.errors import UsageError

_REGION = r"(?P<region>[a-z]{2,}(?:-[a-z]+)+-\d{1,2})"
_DOMAIN = (
    r"(?:amazonaws\.com(?:\.cn)?|api\.aws|api\.amazonwebservices\.com\.cn|amazonaws\.eu"
    r"|c2s\.ic\.gov|sc2s\.sgov\.gov|csp\.hci\.ic\.gov|cloud\.adc-e\.uk)"
)
_STANDARD_HOST = re.compile(rf"sqs\.{_REGION}\.amazonaws\.com(?:\.cn)?")
_LEGACY_HOST = re.compile(rf"(?:{_REGION}\.)?queue\.amazonaws\.com(?:\.cn)?")
# FIPS and dual-stack endpoints, interface VPC endpoints, and the other partitions.
_OTHER_AWS_HOST = re.compile(rf"(?:vpce-[a-z0-9-]+\.)?sqs(?:-fips)?\.{_REGION}\.(?:vpce\.)?{_DOMAIN}")
# LocalStack's host name begins with the region. With any other host name, the region may be in the path.
_LOCALSTACK_HOST = re.compile(rf"(?:sqs\.)?{_REGION}\.(?:queue\.)?localhost\.localstack\.cloud")
_LOCALSTACK_PATH = re.compile(rf"/queue/{_REGION}/\d{{12}}/[^/]+")
_LEGACY_REGION = "us-east-1"
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL")


@dataclass(frozen=True, slots=True)
class QueueEndpoint:
    """Region and endpoint for the SQS client. None: as configured in environment and profile."""

    region: str | None = None
    url: str | None = None


def check_queue_url(queue_url: str) -> None:
    """Reject a value that cannot be a queue's URL, such as its name or its ARN. Raises UsageError."""
    try:
        parts = urlsplit(queue_url)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and len(parts.path) > 1
    except ValueError:
        # The URL has unmatched brackets.
        is_url = False
    if not is_url or " " in queue_url or not queue_url.isprintable():
        message = (
            f"--sqs-queue-url {queue_url}: not the URL of a queue "
            "(such as https://sqs.REGION.amazonaws.com/ACCOUNT/NAME)"
        )
        raise UsageError(message)


def queue_endpoint(queue_url: str) -> QueueEndpoint:
    """Return the endpoint of a queue. Only the hosts of AWS and LocalStack are known."""
    parts = urlsplit(queue_url)
    host = parts.hostname or ""
    if found := _STANDARD_HOST.fullmatch(host):
        return QueueEndpoint(found["region"])
    if found := _LEGACY_HOST.fullmatch(host):
        return QueueEndpoint(found["region"] or _LEGACY_REGION)
    found = _OTHER_AWS_HOST.fullmatch(host)
    if not found:
        localstack = _LOCALSTACK_HOST.fullmatch(host) or _LOCALSTACK_PATH.fullmatch(parts.path)
        return QueueEndpoint(localstack["region"] if localstack else None)
    # A user who configured an endpoint may have no access to the default one.
    is_configured = any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)
    return QueueEndpoint(found["region"], None if is_configured else f"{parts.scheme}://{parts.netloc}")
