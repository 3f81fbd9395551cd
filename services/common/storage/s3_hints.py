"""Why a prefix holds no file: what else is there, in a few requests."""

from typing import Any

from services.common.codec import NAMES, format_of
from services.common.errors import UsageError
from services.common.storage.errors import MissingError, StoreError
from services.common.storage.s3_client import named

_MAX_NAMES = 3


async def hint(client: Any, *, bucket: str, prefix: str) -> str:
    """Return what may have been meant, "" if that cannot be seen.

    Raises UsageError if the prefix is the key of an object whose name says no format.
    """
    key = prefix.rstrip("/")
    try:
        if key and await _is_object(client, bucket, key):
            place = f"s3://{bucket}/{key}"
            if format_of(key) is None:
                message = f"{place}: the name must end in one of {NAMES}"
                raise UsageError(message)
            return f"did you mean {place}?"
        alike = await _names(client, bucket, key, but=prefix)
        if key and alike:
            return f"did you mean {_joined(bucket, alike)}?"
        parent = key.rpartition("/")[0]
        for folder in dict.fromkeys([f"{parent}/" if parent else "", ""]):
            found = await _names(client, bucket, folder, but=prefix)
            if found:
                return f"s3://{bucket}/{folder} has {_joined(bucket, found)}"
    except StoreError:  # whoever may list INPUT need not be allowed to look elsewhere
        return ""
    return "the bucket is empty"


async def _is_object(client: Any, bucket: str, key: str) -> bool:
    try:
        with named(f"s3://{bucket}/{key}"):
            await client.head_object(Bucket=bucket, Key=key)
    except MissingError:
        return False
    return True


async def _names(client: Any, bucket: str, prefix: str, *, but: str) -> list[str]:
    """Return the first folders and objects whose names begin so."""
    with named(f"s3://{bucket}/{prefix}"):
        page = await client.list_objects_v2(
            Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=2 * _MAX_NAMES + 2
        )
    folders = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    keys = [entry["Key"] for entry in page.get("Contents", ())]
    return [name for name in [*folders, *keys] if name != but]


def _joined(bucket: str, names: list[str]) -> str:
    shown = ", ".join(f"s3://{bucket}/{name}" for name in names[:_MAX_NAMES])
    return shown + (", …" if len(names) > _MAX_NAMES else "")
