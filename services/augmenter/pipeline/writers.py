"""Writes the output of one file: its augmented lines, and its rejected lines if there are any."""

import asyncio
import json
from types import TracebackType
from typing import Self

from services.common.codec import PLAIN, Format
from services.common.file_names import REASONS_SUFFIX
from services.common.line_reader import LongLinePart
from services.common.storage.protocol import FileInfo, Storage, Upload
from services.common.tasks import gather_or_cancel


class OutputWriter:
    """An upload that compresses its data."""

    def __init__(self, upload: Upload, lines_format: Format) -> None:
        self._upload = upload
        self._is_plain = lines_format is PLAIN
        self._encoder = lines_format.encoder()

    async def __aenter__(self) -> Self:
        """Begin the upload."""
        await self._upload.__aenter__()
        return self

    async def write(self, data: bytes) -> None:
        """Compress the data in a thread, since compressors release the GIL, and send it."""
        if not self._is_plain:
            data = await asyncio.to_thread(self._encoder.compress, data)
        await self._upload.write(data)

    async def complete(self) -> None:
        """Write the end of the compressed stream and publish the output."""
        await self._upload.write(self._encoder.flush())
        await self._upload.complete()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort the upload, unless it was completed."""
        await self._upload.__aexit__(kind, error, trace)


class RejectsWriter:
    """Writes rejected lines and their reasons, to two uploads that begin with the first rejected line.

    State: `first_rejected`, number and reason of the first rejected line; `_writers`, of lines and reasons.
    """

    def __init__(self, storage: Storage, file: FileInfo, lines_format: Format) -> None:
        self._storage = storage
        self._file = file
        self._format = lines_format
        self._writers: tuple[OutputWriter, OutputWriter] | None = None
        self.first_rejected: tuple[int, str] | None = None

    async def __aenter__(self) -> Self:
        """Return the writer. Its uploads begin with the first rejected line."""
        return self

    @property
    def has_rejects(self) -> bool:
        """Return whether a line was rejected."""
        return self._writers is not None

    async def write(self, rejected: list[tuple[int, bytes, str]]) -> None:
        """Write rejected lines: number, bytes, reason."""
        line_writer, reason_writer = await self._get_writers()
        await line_writer.write(b"".join(line + b"\n" for _, line, _ in rejected))
        await self._write_reasons(reason_writer, [(number, reason) for number, _, reason in rejected])

    async def write_long_line_part(self, part: LongLinePart, *, number: int, reason: str) -> None:
        """Write a part of a rejected line. Its number and reason are written with the last part."""
        line_writer, reason_writer = await self._get_writers()
        await line_writer.write(part.text + b"\n" if part.is_last else part.text)
        if part.is_last:
            await self._write_reasons(reason_writer, [(number, reason)])

    async def _write_reasons(self, writer: OutputWriter, numbered_reasons: list[tuple[int, str]]) -> None:
        if self.first_rejected is None:
            self.first_rejected = numbered_reasons[0]
        await writer.write(
            b"".join(
                json.dumps({"line": number, "reason": reason}).encode() + b"\n"
                for number, reason in numbered_reasons
            )
        )

    async def _get_writers(self) -> tuple[OutputWriter, OutputWriter]:
        if self._writers is None:
            self._writers = await self._open_writers()
        return self._writers

    async def _open_writers(self) -> tuple[OutputWriter, OutputWriter]:
        line_writer = OutputWriter(self._storage.create(self._file.name, self._file), self._format)
        reason_writer = OutputWriter(
            self._storage.create(self._file.name + REASONS_SUFFIX, self._file), PLAIN
        )
        await line_writer.__aenter__()
        try:
            await reason_writer.__aenter__()
        except BaseException as error:
            await line_writer.__aexit__(type(error), error, None)
            raise
        return line_writer, reason_writer

    async def complete(self) -> None:
        """Publish the uploads."""
        for writer in self._writers or ():
            await writer.complete()

    async def remove_stale(self) -> None:
        """Remove the rejects of an earlier run if no line was rejected.

        To be called after the output was published, which then contains all lines.
        """
        if self._writers is None:
            names = (self._file.name, self._file.name + REASONS_SUFFIX)
            await gather_or_cancel(self._storage.remove(name) for name in names)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort the uploads that were not completed."""
        for writer in self._writers or ():
            await writer.__aexit__(kind, error, trace)
