"""Files of augmented postings: local ones, and those in a bucket."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.common.codec import NAMES, Format, format_of
from services.common.errors import CommandError, UsageError
from services.common.file_names import is_input

_READ_BYTES = 2**20
_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was listed; `version` is another whenever its content is."""

    place: str
    size_bytes: int
    modified_at: float
    version: str

    @property
    def format(self) -> Format:
        """How its lines are stored."""
        found = format_of(self.place)
        assert found  # noqa: S101 - none else is listed
        return found


class Place(Protocol):
    """Where files are."""

    async def find(self, place: str) -> Sequence[Source]:
        """The file, or those below a folder. Raises CommandError."""

    def read(self, source: Source) -> AsyncIterator[bytes]:
        """Its bytes in pieces. Raises CommandError."""


class Local:
    """The file system."""

    async def find(self, place: str) -> Sequence[Source]:
        """See `Place.find`."""
        with _named(place):
            return [_of_file(path) for path in _walk(place)]

    async def read(self, source: Source) -> AsyncIterator[bytes]:
        """See `Place.read`."""
        with _named(source.place):
            file = await asyncio.to_thread(Path(source.place).open, "rb")
            with file:
                while data := await asyncio.to_thread(file.read, _READ_BYTES):
                    yield data


class Bucket:
    """`s3://`, with the usual AWS credentials."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def find(self, place: str) -> Sequence[Source]:
        """See `Place.find`."""
        bucket, _, key = place.removeprefix("s3://").partition("/")
        with _named(place):
            if key and not key.endswith("/"):
                head = await self._client.head_object(Bucket=bucket, Key=key)
                return [_of_object(_known(place), head["ContentLength"], head)]
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
            return [
                _of_object(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry)
                async for page in pages
                for entry in page.get("Contents", ())
                if is_input(entry["Key"].removeprefix(key))
            ]

    async def read(self, source: Source) -> AsyncIterator[bytes]:
        """See `Place.read`; of the very version that was listed."""
        bucket, _, key = source.place.removeprefix("s3://").partition("/")
        with _named(source.place):
            answer = await self._client.get_object(Bucket=bucket, Key=key, IfMatch=source.version)
            async with answer["Body"] as body:
                while data := await body.read(_READ_BYTES):
                    yield data


@asynccontextmanager
async def open_places(places: Sequence[str], *, endpoint_url: str | None) -> AsyncIterator[dict[bool, Place]]:
    """By whether a place is in a bucket: who reads it."""
    if not any(place.startswith("s3://") for place in places):
        yield {False: Local()}
        return
    from services.common.aws_client import open_client  # noqa: PLC0415 - half a second; local files need none

    async with open_client("s3", endpoint_url=endpoint_url, connections=_CONNECTIONS) as client:
        yield {False: Local(), True: Bucket(client)}


def is_in_bucket(place: str) -> bool:
    """Whether it is in a bucket rather than here."""
    return place.startswith("s3://")


def _known(place: str) -> str:
    if format_of(place) is None:
        message = f"{place}: the name must end in one of {NAMES}"
        raise UsageError(message)
    return place


def _walk(place: str) -> list[Path]:
    path = Path(place)
    if not path.is_dir():
        return [Path(_known(place))]
    return sorted(
        file for file in path.rglob("*") if is_input(file.relative_to(path).as_posix()) and file.is_file()
    )


def _of_file(path: Path) -> Source:
    status = path.stat()
    return Source(str(path), status.st_size, status.st_mtime, f"{status.st_mtime_ns}-{status.st_size}")


def _of_object(place: str, size_bytes: int, answer: Any) -> Source:
    return Source(place, size_bytes, answer["LastModified"].timestamp(), answer["ETag"])


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the place in every error of the file system, the bucket or the way to it."""
    try:
        yield
    except (CommandError, GeneratorExit):
        raise
    except OSError as error:
        message = f"{place}: {error.strerror or error}"
        raise CommandError(message) from error
    except Exception as error:
        is_library = type(error).__module__.partition(".")[0] in {"botocore", "aiobotocore", "aiohttp"}
        if not is_library and not hasattr(error, "__notes__"):  # of credentials, see aws_credential_logs.py
            raise
        from services.common.aws_errors import reason_of  # noqa: PLC0415 - it is there already

        message = f"{place}: {reason_of(error)}"
        raise CommandError(message) from error
