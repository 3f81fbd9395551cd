"""A progress bar on standard error."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressState:
    """What the bar shows. `before` and `after` are texts on its two sides; `total` None: not known yet."""

    completed: int
    total: int | None
    before: str
    after: str = ""


@asynccontextmanager
async def progress_bar(state: Callable[[float], ProgressState]) -> AsyncIterator[None]:
    """Show a bar while the block runs. `state` gets the elapsed seconds."""
    columns = (
        TextColumn("{task.fields[before]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%{task.fields[after]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as progress:
        bar = progress.add_task("", total=None, before="", after="")

        def update() -> None:
            now = state(progress.tasks[0].elapsed or 0.0)
            progress.update(bar, completed=now.completed, total=now.total, before=now.before, after=now.after)

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
