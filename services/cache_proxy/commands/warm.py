"""`cache-proxy warm`: put the levels of postings that have one into the cache, without calling the model."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict

from services.cache_proxy.cache import namespace
from services.cache_proxy.commands.file_warmer import BytesRead, FileWarmer, WarmStats
from services.cache_proxy.commands.session import open_session
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import OutputSettings, WarmSettings
from services.common.errors import CommandError
from services.common.progress import ProgressState, progress_bar
from services.common.storage.inputs import InputFile, open_inputs

_EXIT_FAILED = 1
_EXIT_SKIPPED = 3


async def run(
    uris: Sequence[str],
    settings: WarmSettings,
    output: OutputSettings,
    cache: CacheSettings,
    key: KeySettings,
) -> int:
    """Put the pairs of every file into the cache. Return the exit code. Raises CommandError."""
    stats = WarmStats()
    started_at = time.monotonic()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(cache, key, allow_new=True))
        files = await stack.enter_async_context(open_inputs(uris, endpoint_url=settings.endpoint_url))
        await namespace.register(session.backend, session.key_settings)
        bytes_read = BytesRead()
        shows_progress = sys.stderr.isatty() if settings.progress is None else settings.progress
        if shows_progress:
            await stack.enter_async_context(progress_bar(_progress_state(files, stats, bytes_read)))
        for file in files:
            warmer = FileWarmer(session, file, settings=settings, stats=stats, bytes_read=bytes_read)
            try:
                await warmer.run(again=settings.again)
                stats.files += 1
            except CommandError as error:
                reason = str(error)
                stats.failures.append(reason if file.uri in reason else f"{file.uri}: {reason}")
    _print_summary(stats, seconds=time.monotonic() - started_at, as_json=output.json)
    if stats.failures:
        return _EXIT_FAILED
    return _EXIT_SKIPPED if stats.skipped else 0


def _progress_state(
    files: Sequence[InputFile], stats: WarmStats, bytes_read: BytesRead
) -> Callable[[float], ProgressState]:
    """Return the function that describes the progress, by the bytes that were read."""
    total = sum(file.info.size_bytes for file in files) or None

    def state(elapsed_seconds: float) -> ProgressState:
        rate = stats.lines / (elapsed_seconds or 1.0)
        before = f"{stats.files:,}/{len(files):,} files {rate:,.0f} lines/s"
        return ProgressState(completed=bytes_read.count, total=total, before=before)

    return state


def _print_summary(stats: WarmStats, *, seconds: float, as_json: bool) -> None:
    for failure in stats.failures:
        sys.stderr.write(f"cache-proxy warm: {' '.join(failure.split())}\n")
    if as_json:
        sys.stdout.write(json.dumps({**asdict(stats), "seconds": round(seconds, 3)}) + "\n")
    else:
        sys.stdout.write(
            f"{stats.pairs:,} pairs of {stats.lines:,} lines in {stats.files:,} files, "
            f"{stats.skipped:,} lines skipped; {seconds:.1f} s, {stats.lines / seconds:,.0f} lines/s\n"
        )
