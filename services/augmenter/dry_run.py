"""What a run would read, counted without asking or writing anything."""

from contextlib import aclosing

from services.augmenter import window
from services.augmenter.jobs import Job
from services.augmenter.object_store.protocol import Store
from services.augmenter.pipeline import read_blocks
from services.augmenter.totals import LineCounts, Totals
from services.augmenter.window import Window


class DryRun:
    """Counts lines, and the distinct pairs of the whole input.

    A pair is remembered by its 64-bit hash: 20M pairs in about 1.5 GB, off by one in ten million runs.
    """

    def __init__(self, *, source: Store, totals: Totals) -> None:
        self._source = source
        self._totals = totals
        self._pairs: set[int] = set()

    @property
    def distinct(self) -> int:
        """Distinct pairs so far."""
        return len(self._pairs)

    async def count(self, job: Job) -> LineCounts:
        """Count one file. Raises FileError."""
        counts = LineCounts()
        async with aclosing(
            read_blocks(self._source, job.item, job.lines_format, self._totals)
        ) as all_blocks:
            async for block in all_blocks:
                count = sum(piece.count for piece in block)
                windows: list[Window] = []
                for pairs in window.parsed(block, first=counts.read + 1, into=windows):
                    self._pairs.update(map(hash, pairs))
                counts.read += count
                self._totals.lines_read += count
                counts.blank += sum(one.blank for one in windows)
                counts.rejected += sum(one.bad for one in windows)
        counts.augmented = counts.read - counts.rejected - counts.blank
        return counts
