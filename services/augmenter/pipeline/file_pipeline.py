"""Augments one file: reads, parses, obtains levels, splices and writes, all at the same time.

A memory budget for text, shared by all files, bounds how far reading is ahead of writing.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial

from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.retry import RetryBudget
from services.augmenter.domain import PairLevels
from services.augmenter.errors import AccountingError, NoLineAugmentedError
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.file_reader import FileReader, ReadLimits
from services.augmenter.pipeline.line_blocks import DEFAULT_FORMAT, ParsedBlock, PostingFormat
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
# Reader and writers of one file hold no more than this beside the text.
_MAX_FILE_BYTES = 8 * 2**20
_MAX_COMPRESSED_FILE_BYTES = 12 * 2**20
# Approximate bytes of text in a compressed byte: a small compressed file takes as much memory as its text.
_COMPRESSION_RATIO = 10
# The minimum that a line takes of the text budget. A line of 30 bytes takes ten times as much once parsed.
_MIN_LINE_BYTES = 128


@dataclass(frozen=True, slots=True)
class _AdmittedChunk:
    """A chunk of lines within the text budget, or a part of a line that is over the limit.

    `blocks` is emptied when it is parsed.
    """

    line_count: int
    size_bytes: int
    blocks: list[LineBlock]
    long_line: LongLinePart | None = None

    @property
    def budget_bytes(self) -> int:
        """Return the bytes that count against the text budget."""
        return max(self.size_bytes, self.line_count * _MIN_LINE_BYTES)


class Pipeline:
    """Augments files, with the storage, the client and the memory budgets that all files share."""

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
        """Write the output of one file, after its rejects. Raises FileError.

        The number of large files that are processed at the same time is bounded by the memory that each needs
        beside its text: a part of its upload, and the windows of its compression.
        """
        if lines_format is PLAIN:
            reserved_bytes = min(file.size_bytes, _MAX_FILE_BYTES)
        else:
            reserved_bytes = min(_COMPRESSION_RATIO * file.size_bytes, _MAX_COMPRESSED_FILE_BYTES)
        async with self._files_budget.reserve(reserved_bytes):
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
        # Reading, requests and writing go on at the same time: `map_ordered` requests the levels of each
        # chunk that is admitted, and yields the chunks in order. When the text budget is used up, reading
        # waits until a written chunk is released.
        with self._client.track_file(), closing(_FileBudget(self._text_budget, self._stats)) as file_budget:
            async with (
                OutputWriter(
                    self._sink.create(output_name, file, expected_version=expected_version), lines_format
                ) as output,
                RejectsWriter(self._rejects, file, lines_format) as rejects,
                aclosing(reader.read_chunks()) as chunks,
                aclosing(file_budget.admit(chunks)) as admitted,
                aclosing(
                    map_ordered(admitted, partial(self._request_levels, retry_budget=retry_budget))
                ) as resolved,
            ):
                async for chunk, (parsed_blocks, levels) in resolved:
                    if chunk.long_line is not None:
                        await self._reject_long_line(chunk.long_line, rejects, counts)
                        file_budget.release(chunk.budget_bytes)
                        continue
                    file_budget.count_lines(sum(parsed.extra_lines for parsed in parsed_blocks))
                    augmented, rejected = line_blocks.apply_levels(parsed_blocks, levels, counts)
                    # While a block is written, only its text is kept in memory.
                    del parsed_blocks, levels
                    if rejected:
                        await rejects.write(rejected)
                    del rejected
                    await output.write(augmented)
                    del augmented
                    file_budget.release(chunk.budget_bytes)
                # Every line that was read must be accounted for, or the output is not published.
                counts.read = file_budget.lines_read
                _check_balance(counts)
                if rejects.first_rejected and not counts.augmented:
                    raise NoLineAugmentedError(
                        rejected=counts.rejected,
                        first_rejected=rejects.first_rejected,
                        format_hint=reader.format_hint,
                    )
                if rejects.has_rejects:
                    await self._check_no_conflict(file, output_name, expected_version)
                # The rejects are published before the output: a run killed in between must not leave an
                # output without its rejected lines.
                await rejects.complete()
                await output.complete()
                await rejects.remove_stale()
        return counts

    async def _check_no_conflict(self, file: FileInfo, output_name: str, expected_version: str) -> None:
        """Raise AlreadyDoneError if another process has written the output meanwhile.

        Otherwise the rejects of this run might stand beside an output with other rejected lines.
        """
        output = await self._sink.existing_output(output_name, file)
        if output and output.is_from_input and output.version != expected_version:
            raise AlreadyDoneError

    async def _reject_long_line(self, part: LongLinePart, rejects: RejectsWriter, counts: LineCounts) -> None:
        """Write a part of a line that is over the limit to the rejects."""
        await rejects.write_long_line_part(
            part, number=counts.accounted + 1, reason=self._limits.long_line_reason
        )
        counts.rejected += part.is_last

    async def _request_levels(
        self, chunk: _AdmittedChunk, *, retry_budget: RetryBudget
    ) -> tuple[list[ParsedBlock], PairLevels]:
        parsed_blocks: list[ParsedBlock] = []
        if chunk.long_line is not None:
            return parsed_blocks, PairLevels(b"")
        pairs = line_blocks.parse_blocks(
            chunk.blocks, parsed_blocks=parsed_blocks, posting_format=self._posting_format
        )
        with self._tracing.span("window", lines=chunk.line_count, bytes=chunk.size_bytes):
            return parsed_blocks, await self._client.get_levels(
                pairs, retry_budget, text_bytes=chunk.size_bytes
            )


class _FileBudget:
    """A file's share of the text budget.

    State: `_acquired_bytes`, all of which `close` releases, however the file ended; `lines_read`, counted
    from the text itself, so that the file's counts can be checked against it.
    """

    def __init__(self, budget: MemoryBudget, stats: RunStats) -> None:
        self._budget = budget
        self._stats = stats
        self._acquired_bytes = 0
        self.lines_read = 0

    async def admit(self, chunks: AsyncGenerator[LineChunk]) -> AsyncGenerator[_AdmittedChunk]:
        """Yield the chunks of lines, each as soon as the text budget has capacity for it."""
        async for chunk in chunks:
            if isinstance(chunk, LongLinePart):
                admitted = _AdmittedChunk(int(chunk.is_last), len(chunk.text), [], chunk)
            else:
                size_bytes = sum(len(block.text) for block in chunk)
                admitted = _AdmittedChunk(sum(block.line_count for block in chunk), size_bytes, chunk)
            await self._budget.acquire(admitted.budget_bytes)
            self._acquired_bytes += admitted.budget_bytes
            self.count_lines(admitted.line_count)
            yield admitted

    def count_lines(self, lines: int) -> None:
        """Count lines that were read, or that one line turned out to hold."""
        self.lines_read += lines
        self._stats.lines_read += lines

    def release(self, size_bytes: int) -> None:
        """Release the bytes of a chunk that is written."""
        self._acquired_bytes -= size_bytes
        self._budget.release(size_bytes)

    def close(self) -> None:
        """Release the rest at the end of the file."""
        self.release(self._acquired_bytes)


def _check_balance(counts: LineCounts) -> None:
    if not counts.is_balanced:
        raise AccountingError(
            lines_in=counts.read,
            augmented=counts.augmented,
            rejected=counts.rejected,
            blank=counts.blank,
        )
