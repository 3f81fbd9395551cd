"""The progress bar of a run."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.augmenter.stats import RunStats
from services.common.progress import ProgressState, progress_bar


@asynccontextmanager
async def run_progress_bar(stats: RunStats) -> AsyncIterator[None]:
    """Show the progress of a run, by the bytes of its input, while the block runs."""

    def state(elapsed_seconds: float) -> ProgressState:
        ended = stats.files_done + stats.files_skipped + stats.failures.count
        rate = f"{stats.lines_read / elapsed_seconds:,.0f} lines/s" if elapsed_seconds else ""
        hits = "" if stats.hit_rate is None else f"{stats.hit_rate:.1%} hits"
        return ProgressState(
            completed=stats.bytes_read,
            total=stats.bytes_found or None,
            before=f"{ended:,}/{stats.files_found:,} files",
            after=f" {rate} {hits}",
        )

    async with progress_bar(state):
        yield
