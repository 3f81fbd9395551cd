"""What is written for one file: its lines, and its rejects if there are any."""

import asyncio
import json
from types import TracebackType
from typing import Self

from services.augmenter.tasks import together
from services.common.codec import PLAIN, Format
from services.common.file_names import REASONS_SUFFIX
from services.common.line_reader import LongLinePart
from services.common.storage.protocol import Item, Store, Upload


class Output:
    """An upload in a format."""

    def __init__(self, upload: Upload, lines_format: Format) -> None:
        self._upload = upload
        self._plain = lines_format is PLAIN
        self._encoder = lines_format.encoder()

    async def __aenter__(self) -> Self:
        """Begin the upload."""
        await self._upload.__aenter__()
        return self

    async def write(self, data: bytes) -> None:
        """Encode beside the event loop (compressors let it run), then send."""
        if not self._plain:
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


class Rejects:
    """The file's rejected lines and the reasons, begun with the first of them."""

    def __init__(self, store: Store, item: Item, lines_format: Format) -> None:
        self._store = store
        self._item = item
        self._format = lines_format
        self._outputs: tuple[Output, Output] | None = None
        self.first: tuple[int, str] | None = None
        """The first rejected line's number and reason."""

    async def __aenter__(self) -> Self:
        """Nothing to begin as long as nothing is rejected."""
        return self

    @property
    def any(self) -> bool:
        """Whether anything was rejected."""
        return self._outputs is not None

    async def write(self, rejected: list[tuple[int, bytes, str]]) -> None:
        """Add lines: number, bytes, reason."""
        lines, reasons = await self._begun()
        await lines.write(b"".join(line + b"\n" for _, line, _ in rejected))
        await self._note(reasons, [(number, reason) for number, _, reason in rejected])

    async def write_part(self, part: LongLinePart, *, number: int, reason: str) -> None:
        """Add a part of a line; with the last one, its number and reason."""
        lines, reasons = await self._begun()
        await lines.write(part.text + b"\n" if part.is_last else part.text)
        if part.is_last:
            await self._note(reasons, [(number, reason)])

    async def _note(self, reasons: Output, noted: list[tuple[int, str]]) -> None:
        if self.first is None:
            self.first = noted[0]
        await reasons.write(
            b"".join(
                json.dumps({"line": number, "reason": reason}).encode() + b"\n" for number, reason in noted
            )
        )

    async def _begun(self) -> tuple[Output, Output]:
        if self._outputs is None:
            self._outputs = await self._begin()
        return self._outputs

    async def _begin(self) -> tuple[Output, Output]:
        lines = Output(self._store.create(self._item.name, self._item), self._format)
        reasons = Output(self._store.create(self._item.name + REASONS_SUFFIX, self._item), PLAIN)
        await lines.__aenter__()
        try:
            await reasons.__aenter__()
        except BaseException as error:
            await lines.__aexit__(type(error), error, None)
            raise
        return lines, reasons

    async def complete(self) -> None:
        """Let them appear."""
        for output in self._outputs or ():
            await output.complete()

    async def clear(self) -> None:
        """Behind the output, which has all lines then: remove what an earlier run rejected of this file."""
        if self._outputs is None:
            names = (self._item.name, self._item.name + REASONS_SUFFIX)
            await together(self._store.remove(name) for name in names)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget what was not completed."""
        for output in self._outputs or ():
            await output.__aexit__(kind, error, trace)
