"""What is written for one file: its lines, and its rejects if there are any."""

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
    """An upload in a format."""

    def __init__(self, upload: Upload, lines_format: Format) -> None:
        self._upload = upload
        self._is_plain = lines_format is PLAIN
        self._encoder = lines_format.encoder()

    async def __aenter__(self) -> Self:
        """Begin the upload."""
        await self._upload.__aenter__()
        return self

    async def write(self, data: bytes) -> None:
        """Encode beside the event loop (compressors let it run), then send."""
        if not self._is_plain:
            data = await asyncio.to_thread(self._encoder.compress, data)
        await self._upload.write(data)

    async def complete(self) -> None:
        """Write the format's end and let the output appear."""
        await self._upload.write(self._encoder.flush())
        await self._upload.complete()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget it, unless it was completed."""
        await self._upload.__aexit__(kind, error, trace)


class RejectsWriter:
    """The file's rejected lines and the reasons, begun with the first of them."""

    def __init__(self, storage: Storage, file: FileInfo, lines_format: Format) -> None:
        self._storage = storage
        self._file = file
        self._format = lines_format
        self._writers: tuple[OutputWriter, OutputWriter] | None = None
        self.first_rejected: tuple[int, str] | None = None
        """The first rejected line's number and reason."""

    async def __aenter__(self) -> Self:
        """Nothing to begin as long as nothing is rejected."""
        return self

    @property
    def has_rejects(self) -> bool:
        """Whether anything was rejected."""
        return self._writers is not None

    async def write(self, rejected: list[tuple[int, bytes, str]]) -> None:
        """Add lines: number, bytes, reason."""
        lines, reasons = await self._get_writers()
        await lines.write(b"".join(line + b"\n" for _, line, _ in rejected))
        await self._write_reasons(reasons, [(number, reason) for number, _, reason in rejected])

    async def write_long_line_part(self, part: LongLinePart, *, number: int, reason: str) -> None:
        """Add a part of a line; with the last one, its number and reason."""
        lines, reasons = await self._get_writers()
        await lines.write(part.text + b"\n" if part.is_last else part.text)
        if part.is_last:
            await self._write_reasons(reasons, [(number, reason)])

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
        lines = OutputWriter(self._storage.create(self._file.name, self._file), self._format)
        reasons = OutputWriter(self._storage.create(self._file.name + REASONS_SUFFIX, self._file), PLAIN)
        await lines.__aenter__()
        try:
            await reasons.__aenter__()
        except BaseException as error:
            await lines.__aexit__(type(error), error, None)
            raise
        return lines, reasons

    async def complete(self) -> None:
        """Let them appear."""
        for output in self._writers or ():
            await output.complete()

    async def remove_stale(self) -> None:
        """Behind the output, which has all lines then: remove what an earlier run rejected of this file."""
        if self._writers is None:
            names = (self._file.name, self._file.name + REASONS_SUFFIX)
            await gather_or_cancel(self._storage.remove(name) for name in names)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget what was not completed."""
        for output in self._writers or ():
            await output.__aexit__(kind, error, trace)
