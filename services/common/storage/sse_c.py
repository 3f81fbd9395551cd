"""SSE-C: S3 encrypts objects with a key that each request carries and that S3 does not store.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/ServerSideEncryptionCustomerKeys.html
"""

import base64
import binascii
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.utils import get_environ_proxies

from services.common.errors import UsageError
from services.common.file_reload import read_file
from services.common.grpc_target import is_local_target
from services.common.redaction import warn_if_world_readable

# AES-256.
_KEY_BYTES = 32
_OPERATIONS = (
    "HeadObject",
    "GetObject",
    "PutObject",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
)


def read_key(path: str, *, flag_name: str) -> bytes:
    """Return the key in a file: 32 bytes, or their base64. Raises UsageError, which never shows the key."""
    content = read_file(path, flag_name=flag_name)
    warn_if_world_readable(Path(path), flag_name=flag_name)
    if len(content) == _KEY_BYTES:
        return content
    try:
        key = base64.b64decode(content.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        message = f"{flag_name} {path}: it holds neither a key of {_KEY_BYTES} bytes nor the base64 of one"
        raise UsageError(message)
    return key


def send_key(client: Any, key: bytes, *, flag_name: str) -> None:
    """Make an S3 client send the key with every request that concerns an object's content.

    Raises UsageError if the key would leave this machine unencrypted.
    """
    endpoint = urlsplit(client.meta.endpoint_url)
    if endpoint.scheme != "https" and not is_local_target(f"{endpoint.hostname}:0"):
        message = f"{flag_name}: {endpoint.hostname} would get the key in the clear; use an https endpoint"
        raise UsageError(message)
    proxies: Any = get_environ_proxies(client.meta.endpoint_url)  # type: ignore[no-untyped-call]
    if endpoint.scheme != "https" and proxies:
        message = (
            f"{flag_name}: the HTTP proxy that the environment names would get the key in the clear; "
            f"name {endpoint.hostname} in no_proxy"
        )
        raise UsageError(message)
    for operation in _OPERATIONS:
        client.meta.events.register(f"provide-client-params.s3.{operation}", partial(_with_key, key=key))


def _with_key(params: dict[str, Any], *, key: bytes, **_: Any) -> dict[str, Any]:
    """Return the parameters of a request with the key. botocore adds the key's checksum."""
    return {**params, "SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
