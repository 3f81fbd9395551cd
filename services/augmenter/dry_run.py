"""Counts what a run would read, without sending or writing anything."""

from contextlib import aclosing

from services.augmenter.domain import FileTask
from services.augmenter.errors import NoLineAugmentedError
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.file_reader import FileReader, ReadLimits
from services.augmenter.pipeline.line_blocks import DEFAULT_FORMAT, ParsedBlock, PostingFormat
from services.augmenter.stats import LineCounts, RunStats
from services.common.line_reader import LongLinePart
from services.common.storage.protocol import Storage


class DryRunCounter:
    """Counts lines, and the distinct pairs of the whole input.

    A pair is stored as its 64-bit hash: 20M pairs take about 1.5 GB, and the count is off by one in one of
    ten million runs.

    State: `_pair_hashes`, of all files so far.
    """

    def __init__(
        self,
        *,
        source: Storage,
        stats: RunStats,
        limits: ReadLimits | None = None,
        posting_format: PostingFormat = DEFAULT_FORMAT,
    ) -> None:
        self._posting_format = posting_format
        self._source = source
        self._limits = limits or ReadLimits()
        self._stats = stats
        self._pair_hashes: set[int] = set()

    @property
    def distinct_pairs(self) -> int:
        """Return the number of distinct pairs so far."""
        return len(self._pair_hashes)

    async def count_file(self, task: FileTask) -> LineCounts:
        """Count the lines and pairs of one file. Raises FileError."""
        counts = LineCounts()
        reader = FileReader(self._source, task.file, task.lines_format, self._stats, self._limits)
        first_rejected: tuple[int, str] | None = None
        async with aclosing(reader.read_chunks()) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, LongLinePart):
                    first_rejected = first_rejected or (counts.read + 1, self._limits.long_line_reason)
                    self._add_counts(counts, LineCounts(read=chunk.is_last, rejected=chunk.is_last))
                    continue
                parsed_blocks: list[ParsedBlock] = []
                for pairs in line_blocks.parse_blocks(
                    chunk, parsed_blocks=parsed_blocks, posting_format=self._posting_format
                ):
                    self._pair_hashes.update(map(hash, pairs))
                for parsed_block in parsed_blocks:
                    if first_rejected is None and (rejection := parsed_block.first_rejected()):
                        first_rejected = (counts.read + 1 + rejection[0], rejection[1])
                    self._add_counts(
                        counts,
                        LineCounts(
                            read=parsed_block.line_count,
                            rejected=parsed_block.rejected_count,
                            blank=parsed_block.blank_count,
                        ),
                    )
        counts.augmented = counts.read - counts.rejected - counts.blank
        if first_rejected and not counts.augmented:
            raise NoLineAugmentedError(
                rejected=counts.rejected, first_rejected=first_rejected, format_hint=reader.format_hint
            )
        return counts

    def _add_counts(self, counts: LineCounts, more: LineCounts) -> None:
        counts.add(more)
        self._stats.lines_read += more.read
