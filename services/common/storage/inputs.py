"""List the input files that local paths and S3 URIs name."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.codec import SUFFIX_HELP, Format, format_for_name
from services.common.errors import UsageError
from services.common.storage.local import LocalStore
from services.common.storage.protocol import FileInfo, Storage

_S3_SCHEME = "s3://"
_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class InputFile:
    """A listed file and the storage to read it from."""

    storage: Storage
    info: FileInfo

    @property
    def uri(self) -> str:
        """Return the full address of the file."""
        return self.storage.uri(self.info.name)

    @property
    def format(self) -> Format:
        """Return the format that the name denotes."""
        found = format_for_name(self.info.name)
        # A listing yields no other names.
        assert found  # noqa: S101 - see above
        return found


@asynccontextmanager
async def open_inputs(uris: Sequence[str], *, endpoint_url: str | None) -> AsyncIterator[list[InputFile]]:
    """Yield the files that `uris` name; they can be read while the block runs.

    Each is a local file or folder, or `s3://BUCKET/KEY` or `s3://BUCKET/PREFIX/`, read with the usual AWS
    credentials. Raises UsageError for the name of a file that has no known format, else StorageError.
    """
    if not any(_is_s3(uri) for uri in uris):
        yield [file for uri in uris for file in await _list_local(uri)]
        return
    # The import takes half a second, which local files need not wait for.
    from services.common.aws_client import open_client  # noqa: PLC0415 - see above

    async with open_client("s3", endpoint_url=endpoint_url, max_connections=_CONNECTIONS) as client:
        files: list[InputFile] = []
        for uri in uris:
            files += await _list_s3(client, uri) if _is_s3(uri) else await _list_local(uri)
        yield files


def _is_s3(uri: str) -> bool:
    return uri.startswith(_S3_SCHEME)


async def _list_local(uri: str) -> list[InputFile]:
    path = Path(uri)
    if await asyncio.to_thread(path.is_dir):
        return await _list_all(LocalStore(path, is_strict=False))
    _check_name(uri)
    storage = LocalStore(path.parent, is_strict=False)
    return [InputFile(storage, await storage.get_info(path.name))]


async def _list_s3(client: Any, uri: str) -> list[InputFile]:
    from services.common.storage.s3 import S3Store  # noqa: PLC0415 - see open_inputs

    bucket, _, key = uri.removeprefix(_S3_SCHEME).partition("/")
    folder, slash, name = key.rpartition("/")
    storage = S3Store(client, bucket=bucket, prefix=folder + slash)
    if not name:
        return await _list_all(storage)
    info = await storage.get_info(name)
    _check_name(uri)
    return [InputFile(storage, info)]


async def _list_all(storage: Storage) -> list[InputFile]:
    return [InputFile(storage, info) async for info in storage.list()]


def _check_name(uri: str) -> None:
    if format_for_name(uri) is None:
        message = f"{uri}: the name must end in one of {SUFFIX_HELP}"
        raise UsageError(message)
