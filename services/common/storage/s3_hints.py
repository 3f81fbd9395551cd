"""Explain to the user why a prefix holds no file, by a few requests for what else the bucket holds."""

from typing import Any

from services.common.codec import SUFFIX_HELP, format_for_name
from services.common.errors import UsageError
from services.common.storage.errors import FileMissingError, StorageError
from services.common.storage.s3_client import translate_errors

_MAX_NAMES = 3


async def explain_empty_prefix(client: Any, *, bucket: str, prefix: str) -> str:
    """Return what the user may have meant, or "" if that is unknown.

    Raises UsageError if the prefix is the key of an object whose name has no known format.
    """
    key = prefix.rstrip("/")
    try:
        if key and await _is_object(client, bucket, key):
            uri = f"s3://{bucket}/{key}"
            if format_for_name(key) is None:
                message = f"{uri}: the name must end in one of {SUFFIX_HELP}"
                raise UsageError(message)
            return f"did you mean {uri}?"
        similar = await _list_names(client, bucket, key, exclude=prefix)
        if key and similar:
            return f"did you mean {_join_uris(bucket, similar)}?"
        parent = key.rpartition("/")[0]
        for folder in dict.fromkeys([f"{parent}/" if parent else "", ""]):
            names = await _list_names(client, bucket, folder, exclude=prefix)
            if names:
                return f"s3://{bucket}/{folder} has {_join_uris(bucket, names)}"
    except StorageError:
        # The right to list INPUT need not include the right to list other prefixes.
        return ""
    return "the bucket is empty"


async def _is_object(client: Any, bucket: str, key: str) -> bool:
    try:
        with translate_errors(f"s3://{bucket}/{key}"):
            await client.head_object(Bucket=bucket, Key=key)
    except FileMissingError:
        return False
    return True


async def _list_names(client: Any, bucket: str, prefix: str, *, exclude: str) -> list[str]:
    """Return the first folders and objects whose names begin with `prefix`."""
    with translate_errors(f"s3://{bucket}/{prefix}"):
        page = await client.list_objects_v2(
            Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=2 * _MAX_NAMES + 2
        )
    folders = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    keys = [entry["Key"] for entry in page.get("Contents", ())]
    return [name for name in [*folders, *keys] if name != exclude]


def _join_uris(bucket: str, names: list[str]) -> str:
    shown = ", ".join(f"s3://{bucket}/{name}" for name in names[:_MAX_NAMES])
    return shown + (", …" if len(names) > _MAX_NAMES else "")
