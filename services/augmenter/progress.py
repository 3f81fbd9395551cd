"""The progress bar of a run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from services.augmenter.stats import RunStats

_REFRESH_SECONDS = 0.2


@asynccontextmanager
async def progress_bar(stats: RunStats) -> AsyncIterator[None]:
    """Show a progress bar of the input's bytes, updated from `stats`, while the block runs."""
    columns = (
        TextColumn("{task.fields[files]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[rate]} {task.fields[hits]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as progress:
        bar = progress.add_task("", total=None, files="", rate="", hits="")

        def update() -> None:
            elapsed = progress.tasks[0].elapsed or 0.0
            finished_files = stats.files_done + stats.files_skipped + stats.failures.count
            progress.update(
                bar,
                completed=stats.bytes_read,
                total=stats.bytes_found or None,
                files=f"{finished_files:,}/{stats.files_found:,} files",
                rate=f"{stats.lines_read / elapsed:,.0f} lines/s" if elapsed else "",
                hits="" if stats.hit_rate is None else f"{stats.hit_rate:.1%} hits",
            )

        async def refresh() -> None:
            while True:
                update()
                await asyncio.sleep(_REFRESH_SECONDS)

        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            update()
