"""Files of augmented postings: local ones, and those in a bucket."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.common.codec import SUFFIX_HELP, Format, format_for_name
from services.common.errors import CommandError, UsageError
from services.common.file_names import is_input

_READ_BYTES = 2**20
_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was listed; `version` is another whenever its content is."""

    uri: str
    size_bytes: int
    modified_at: float
    version: str

    @property
    def format(self) -> Format:
        """How its lines are stored."""
        found = format_for_name(self.uri)
        assert found  # noqa: S101 - none else is listed
        return found


class FileSource(Protocol):
    """Where files are."""

    async def list_files(self, uri: str) -> Sequence[InputFile]:
        """The file, or those below a folder. Raises CommandError."""

    def read(self, file: InputFile) -> AsyncIterator[bytes]:
        """Its bytes in pieces. Raises CommandError."""


class LocalSource:
    """The file system."""

    async def list_files(self, uri: str) -> Sequence[InputFile]:
        """See `Place.find`."""
        with _translate_errors(uri):
            return [_file_from_stat(path) for path in _list_folder(uri)]

    async def read(self, file: InputFile) -> AsyncIterator[bytes]:
        """See `Place.read`."""
        with _translate_errors(file.uri):
            stream = await asyncio.to_thread(Path(file.uri).open, "rb")
            with stream:
                while data := await asyncio.to_thread(stream.read, _READ_BYTES):
                    yield data


class S3Source:
    """`s3://`, with the usual AWS credentials."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def list_files(self, uri: str) -> Sequence[InputFile]:
        """See `Place.find`."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        with _translate_errors(uri):
            if key and not key.endswith("/"):
                head = await self._client.head_object(Bucket=bucket, Key=key)
                return [_file_from_s3(_require_known_format(uri), head["ContentLength"], head)]
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
            return [
                _file_from_s3(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry)
                async for page in pages
                for entry in page.get("Contents", ())
                if is_input(entry["Key"].removeprefix(key))
            ]

    async def read(self, file: InputFile) -> AsyncIterator[bytes]:
        """See `Place.read`; of the very version that was listed."""
        bucket, _, key = file.uri.removeprefix("s3://").partition("/")
        with _translate_errors(file.uri):
            answer = await self._client.get_object(Bucket=bucket, Key=key, IfMatch=file.version)
            async with answer["Body"] as body:
                while data := await body.read(_READ_BYTES):
                    yield data


@asynccontextmanager
async def open_sources(
    uris: Sequence[str], *, endpoint_url: str | None
) -> AsyncIterator[dict[bool, FileSource]]:
    """By whether a place is in a bucket: who reads it."""
    if not any(place.startswith("s3://") for place in uris):
        yield {False: LocalSource()}
        return
    from services.common.aws_client import open_client  # noqa: PLC0415 - half a second; local files need none

    async with open_client("s3", endpoint_url=endpoint_url, max_connections=_CONNECTIONS) as client:
        yield {False: LocalSource(), True: S3Source(client)}


def is_s3_uri(uri: str) -> bool:
    """Whether it is in a bucket rather than here."""
    return uri.startswith("s3://")


def _require_known_format(uri: str) -> str:
    if format_for_name(uri) is None:
        message = f"{uri}: the name must end in one of {SUFFIX_HELP}"
        raise UsageError(message)
    return uri


def _list_folder(uri: str) -> list[Path]:
    path = Path(uri)
    if not path.is_dir():
        return [Path(_require_known_format(uri))]
    return sorted(
        file for file in path.rglob("*") if is_input(file.relative_to(path).as_posix()) and file.is_file()
    )


def _file_from_stat(path: Path) -> InputFile:
    status = path.stat()
    return InputFile(str(path), status.st_size, status.st_mtime, f"{status.st_mtime_ns}-{status.st_size}")


def _file_from_s3(uri: str, size_bytes: int, answer: Any) -> InputFile:
    return InputFile(uri, size_bytes, answer["LastModified"].timestamp(), answer["ETag"])


@contextmanager
def _translate_errors(uri: str) -> Iterator[None]:
    """Name the place in every error of the file system, the bucket or the way to it."""
    try:
        yield
    except (CommandError, GeneratorExit):
        raise
    except OSError as error:
        message = f"{uri}: {error.strerror or error}"
        raise CommandError(message) from error
    except Exception as error:
        is_library = type(error).__module__.partition(".")[0] in {"botocore", "aiobotocore", "aiohttp"}
        if not is_library and not hasattr(error, "__notes__"):  # of credentials, see aws_credential_logs.py
            raise
        from services.common.aws_errors import error_reason  # noqa: PLC0415 - it is there already

        message = f"{uri}: {error_reason(error)}"
        raise CommandError(message) from error
