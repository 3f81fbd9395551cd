"""One file: read, parse, ask, splice, write, all at once; how far ahead is bounded by the room for text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial

from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.retry import RetryBudget
from services.augmenter.errors import AccountingError, NoLineAugmentedError
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.file_reader import FileReader, ReadLimits
from services.augmenter.pipeline.line_blocks import DEFAULT_FORMAT, PairLevels, ParsedBlock, PostingFormat
from services.augmenter.pipeline.writers import OutputWriter, RejectsWriter
from services.augmenter.stats import LineCounts, RunStats
from services.common.codec import PLAIN, Format
from services.common.line_reader import LineBlock, LineChunk, LongLinePart
from services.common.memory_budget import MemoryBudget
from services.common.storage.errors import AlreadyDoneError
from services.common.storage.protocol import FileInfo, Storage
from services.common.tasks import map_ordered
from services.common.tracing import OFF, Tracing

TEXT_BUDGET_BYTES = 24 * 2**20
_FILES_BUDGET_BYTES = 48 * 2**20
_MAX_FILE_BYTES, _MAX_COMPRESSED_FILE_BYTES = (
    8 * 2**20,
    12 * 2**20,
)  # at most: what reads and writes it holds no more
_COMPRESSION_RATIO = (
    10  # bytes of text in a compressed one, about: little of it is as much to hold as its text
)
_MIN_LINE_BYTES = 128  # in the room, at least: a line of 30 takes ten times as much with what is parsed of it


@dataclass(frozen=True, slots=True)
class _AdmittedBlock:
    """Lines that are given room, or a part of one that is over the limit.

    Their pieces are there until they are parsed.
    """

    line_count: int
    size_bytes: int
    pieces: list[LineBlock]
    long_line: LongLinePart | None = None

    @property
    def budget_bytes(self) -> int:
        """What it counts in the room."""
        return max(self.size_bytes, self.line_count * _MIN_LINE_BYTES)


class Pipeline:
    """What every file's way through has in common."""

    def __init__(
        self,
        *,
        source: Storage,
        sink: Storage,
        rejects: Storage,
        client: ProxyClient,
        stats: RunStats,
        tracing: Tracing = OFF,
        limits: ReadLimits | None = None,
        posting_format: PostingFormat = DEFAULT_FORMAT,
    ) -> None:
        self._source = source
        self._sink = sink
        self._rejects = rejects
        self._client = client
        self._stats = stats
        self._tracing = tracing
        self._posting_format = posting_format
        self._limits = limits or ReadLimits()
        self._text_budget = MemoryBudget(limit_bytes=TEXT_BUDGET_BYTES)
        self._files_budget = MemoryBudget(limit_bytes=_FILES_BUDGET_BYTES)

    async def augment(
        self,
        file: FileInfo,
        *,
        output_name: str,
        expected_version: str,
        lines_format: Format,
        retry_budget: RetryBudget,
    ) -> LineCounts:
        """Make the output of one file, whole, its rejects before it. Raises FileError.

        However many may be in work: of large files only so many as there is memory for what each holds
        beside the text, a part of its upload and the windows of its compression.
        """
        if lines_format is PLAIN:
            held_bytes = min(file.size_bytes, _MAX_FILE_BYTES)
        else:
            held_bytes = min(_COMPRESSION_RATIO * file.size_bytes, _MAX_COMPRESSED_FILE_BYTES)
        async with self._files_budget.reserve(held_bytes):
            return await self._augment(file, output_name, expected_version, lines_format, retry_budget)

    async def _augment(
        self,
        file: FileInfo,
        output_name: str,
        expected_version: str,
        lines_format: Format,
        retry_budget: RetryBudget,
    ) -> LineCounts:
        counts = LineCounts()
        reader = FileReader(self._source, file, lines_format, self._stats, self._limits)
        with self._client.track_file(), closing(_FileBudget(self._text_budget, self._stats)) as in_hand:
            async with (
                OutputWriter(
                    self._sink.create(output_name, file, expected_version=expected_version), lines_format
                ) as output,
                RejectsWriter(self._rejects, file, lines_format) as rejects,
                aclosing(reader.blocks()) as read,
                aclosing(in_hand.admit(read)) as let_in,
                aclosing(
                    map_ordered(let_in, partial(self._request_levels, retry_budget=retry_budget))
                ) as asked,
            ):
                async for block, (windows, answers) in asked:
                    if block.long_line is not None:
                        await self._reject_long_line(block.long_line, rejects, counts)
                        in_hand.release(block.budget_bytes)
                        continue
                    in_hand.count_lines(sum(one.extra_lines for one in windows))
                    augmented, rejected = line_blocks.apply_levels(windows, answers, counts)
                    del windows, answers  # while it is written, only the text of it is held
                    if rejected:
                        await rejects.write(rejected)
                    del rejected
                    await output.write(augmented)
                    del augmented
                    in_hand.release(block.budget_bytes)
                counts.read = in_hand.lines_read
                _check_balance(counts)
                if rejects.first_rejected and not counts.augmented:
                    raise NoLineAugmentedError(
                        rejected=counts.rejected,
                        first_rejected=rejects.first_rejected,
                        format_hint=reader.format_hint,
                    )
                if rejects.has_rejects:
                    await self._check_no_conflict(file, output_name, expected_version)
                await rejects.complete()
                await output.complete()
                await rejects.remove_stale()
        return counts

    async def _check_no_conflict(self, file: FileInfo, output_name: str, expected_version: str) -> None:
        """Or our rejects would stand beside an output for which the model answered differently."""
        made = await self._sink.existing_output(output_name, file)
        if made and made.is_from_input and made.version != expected_version:
            raise AlreadyDoneError

    async def _reject_long_line(self, part: LongLinePart, rejects: RejectsWriter, counts: LineCounts) -> None:
        """Pass a line that is over the limit on to the rejects, part by part."""
        await rejects.write_long_line_part(
            part, number=counts.accounted + 1, reason=self._limits.long_line_reason
        )
        counts.rejected += part.is_last

    async def _request_levels(
        self, block: _AdmittedBlock, *, retry_budget: RetryBudget
    ) -> tuple[list[ParsedBlock], PairLevels]:
        windows: list[ParsedBlock] = []
        if block.long_line is not None:
            return windows, PairLevels(b"")
        pairs = line_blocks.parse_block(
            block.pieces, parsed_blocks=windows, posting_format=self._posting_format
        )
        with self._tracing.span("window", lines=block.line_count, bytes=block.size_bytes):
            return windows, await self._client.get_levels(pairs, retry_budget, text_bytes=block.size_bytes)


class _FileBudget:
    """A file's part of the room.

    State: `_taken_bytes`, all of which goes back in `close`, however the file ended; `lines_read`, counted
    from the text itself, so that it is what the file's books are checked against.
    """

    def __init__(self, budget: MemoryBudget, stats: RunStats) -> None:
        self._budget = budget
        self._stats = stats
        self._acquired_bytes = 0
        self.lines_read = 0

    async def admit(self, blocks: AsyncGenerator[LineChunk]) -> AsyncGenerator[_AdmittedBlock]:
        """The blocks, each as soon as there is room for it."""
        async for read in blocks:
            if isinstance(read, LongLinePart):
                block = _AdmittedBlock(int(read.is_last), len(read.text), [], read)
            else:
                size_bytes = sum(len(piece.text) for piece in read)
                block = _AdmittedBlock(sum(piece.line_count for piece in read), size_bytes, read)
            await self._budget.acquire(block.budget_bytes)
            self._acquired_bytes += block.budget_bytes
            self.count_lines(block.line_count)
            yield block

    def count_lines(self, lines: int) -> None:
        """So many lines were read, or one was found to be so many more."""
        self.lines_read += lines
        self._stats.lines_read += lines

    def release(self, size_bytes: int) -> None:
        """A block of this size is written."""
        self._acquired_bytes -= size_bytes
        self._budget.release(size_bytes)

    def close(self) -> None:
        """The file is done, or failed."""
        self.release(self._acquired_bytes)


def _check_balance(counts: LineCounts) -> None:
    if not counts.is_balanced:
        raise AccountingError(
            lines_in=counts.read,
            augmented=counts.augmented,
            rejected=counts.rejected,
            blank=counts.blank,
        )
