"""What a run would read, counted without asking or writing anything."""

from contextlib import aclosing

from services.augmenter.errors import NoLineAugmentedError
from services.augmenter.pipeline import line_blocks
from services.augmenter.pipeline.file_reader import FileReader, ReadLimits
from services.augmenter.pipeline.line_blocks import STANDARD, PostingFormat, Window
from services.augmenter.sources.listing import Job
from services.augmenter.stats import LineCounts, Totals
from services.common.line_reader import LongLinePart
from services.common.storage.protocol import Store


class DryRun:
    """Counts lines, and the distinct pairs of the whole input.

    A pair is remembered by its 64-bit hash: 20M pairs in about 1.5 GB, off by one in ten million runs.
    """

    def __init__(
        self,
        *,
        source: Store,
        totals: Totals,
        limits: ReadLimits | None = None,
        form: PostingFormat = STANDARD,
    ) -> None:
        self._form = form
        self._source = source
        self._limits = limits or ReadLimits()
        self._totals = totals
        self._pairs: set[int] = set()

    @property
    def distinct(self) -> int:
        """Distinct pairs so far."""
        return len(self._pairs)

    async def count(self, job: Job) -> LineCounts:
        """Count one file. Raises FileError."""
        counts = LineCounts()
        reader = FileReader(self._source, job.item, job.lines_format, self._totals, self._limits)
        first: tuple[int, str] | None = None
        async with aclosing(reader.blocks()) as all_blocks:
            async for block in all_blocks:
                if isinstance(block, LongLinePart):
                    first = first or (counts.read + 1, self._limits.long_line_reason)
                    self._count(counts, LineCounts(read=block.is_last, rejected=block.is_last))
                    continue
                windows: list[Window] = []
                for pairs in line_blocks.parsed(block, into=windows, form=self._form):
                    self._pairs.update(map(hash, pairs))
                for one in windows:
                    if first is None and (bad := one.first_bad()):
                        first = (counts.read + 1 + bad[0], bad[1])
                    self._count(counts, LineCounts(read=one.count, rejected=one.bad, blank=one.blank))
        counts.augmented = counts.read - counts.rejected - counts.blank
        if first and not counts.augmented:
            raise NoLineAugmentedError(rejected=counts.rejected, first=first, hint=reader.hint)
        return counts

    def _count(self, counts: LineCounts, more: LineCounts) -> None:
        counts.add(more)
        self._totals.lines_read += more.read
