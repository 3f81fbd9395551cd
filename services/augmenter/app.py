"""Composition root of `augmenter run`: builds the components, runs them and reports the outcome."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from prometheus_client import CollectorRegistry

from services.augmenter import summary
from services.augmenter.client.channel import ProxyCredentials
from services.augmenter.config import RunSettings
from services.augmenter.domain import FileTask
from services.augmenter.dry_run import DryRunCounter
from services.augmenter.errors import TerminatedError
from services.augmenter.file_augmenter import build_file_augmenter
from services.augmenter.metrics import Metrics
from services.augmenter.paths import RunPaths, S3Uri
from services.augmenter.pipeline import allocator
from services.augmenter.run_storage import RunStorage, open_run_storage
from services.augmenter.runner import Runner
from services.augmenter.sources import empty_input
from services.augmenter.sources.listing import FileLister, Shard
from services.augmenter.sources.queue_url import queue_endpoint
from services.augmenter.sources.watch import Watcher
from services.augmenter.stats import LineCounts, RunStats
from services.common.signals import ShutdownSignal
from services.common.tracing import OFF, Span, Tracing

PROGRAM = "augmenter"
# Kubernetes gives 30 seconds between SIGTERM and SIGKILL.
GRACE_SECONDS = 20.0
_EXIT_FAILED = 1
_EXIT_INCOMPLETE = 3
_log = logging.getLogger(__name__)


async def run(settings: RunSettings, run_paths: RunPaths, tracing: Tracing = OFF) -> int:
    """Process INPUT, with --watch until SIGTERM, and return the exit code. Raises CommandError."""
    credentials = ProxyCredentials.load(settings.tls_files, token_file=settings.token_file)
    allocator.tune_allocator()
    shutdown = ShutdownSignal(grace_seconds=GRACE_SECONDS if settings.watch else 0)
    try:
        with tracing.start_trace("augmenter.run", watch=settings.watch) as span:
            return await _run(settings, run_paths, credentials, shutdown.stopping, tracing, span)
    except asyncio.CancelledError:
        if not shutdown.stopping.is_set():
            raise
        # With --watch, files that were cancelled have no output, so the next run finds and processes them.
        if settings.watch:
            return 0
        raise TerminatedError("stopped by SIGTERM; run again to go on") from None


async def _run(
    settings: RunSettings,
    run_paths: RunPaths,
    credentials: ProxyCredentials,
    stopping: asyncio.Event,
    tracing: Tracing,
    span: Span,
) -> int:
    stats = RunStats()
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        if settings.http_listen:
            from services.common.http_server import HttpEndpoint  # noqa: PLC0415 - see run_storage.py

            http = HttpEndpoint(registry=registry)
            stack.push_async_callback(http.close)
            _log.info("metrics on http://%s/metrics", await http.start(settings.http_listen))
        storage = await open_run_storage(settings, run_paths, stack)
        show_progress = sys.stderr.isatty() if settings.progress is None else settings.progress
        if show_progress:
            from services.augmenter.progress import run_progress_bar  # noqa: PLC0415 - see run_storage.py

            await stack.enter_async_context(run_progress_bar(stats))
        dry_run = DryRunCounter(
            source=storage.source,
            stats=stats,
            limits=settings.read_limits,
            posting_format=settings.posting_format,
        )
        process_file: Callable[[FileTask], Awaitable[LineCounts]] = dry_run.count_file
        if not settings.dry_run:
            await storage.sink.check_writable()
            process_file = await build_file_augmenter(
                settings, credentials, storage, stack, stats, metrics, tracing
            )
        runner = Runner(
            source=storage.source,
            process_file=process_file,
            stats=stats,
            metrics=metrics,
            log_failures=settings.watch,
            skip_missing=settings.missing_input == "skip",
        )
        await _process_files(settings, run_paths, storage, runner, stats, metrics, stopping, stack)
        was_listed = not (
            settings.watch or settings.sqs_queue_url or run_paths.input_name or stopping.is_set()
        )
        empty_reason = ""
        if was_listed and not settings.ok_empty:
            empty_reason = await empty_input.explain_empty_input(storage.source, stats)
    stats.seconds = time.monotonic() - started
    span.set_attributes(done=stats.files_done, skipped=stats.files_skipped, failed=stats.failures.count)
    summary.write_failures(stats, program=PROGRAM)
    if settings.dry_run:
        sys.stdout.write(summary.format_dry_run_summary(stats, distinct_pairs=dry_run.distinct_pairs))
    else:
        sys.stdout.write(summary.format_summary(stats, rejects_uri=storage.rejects.uri("")))
    if settings.summary_json:
        summary.write_summary_json(stats, settings.summary_json)
    if empty_reason:
        sys.stderr.write(f"{PROGRAM}: {empty_reason}\n")
    return 0 if settings.watch else _exit_code(settings, stats, is_empty=empty_reason != "")


async def _process_files(
    settings: RunSettings,
    run_paths: RunPaths,
    storage: RunStorage,
    runner: Runner,
    stats: RunStats,
    metrics: Metrics,
    stopping: asyncio.Event,
    stack: AsyncExitStack,
) -> None:
    """Process every file, whether a listing, --watch or a queue's messages name it."""
    lister = FileLister(
        storage.source,
        storage.sink,
        shard=Shard(*settings.shard),
        overwrite=settings.overwrite,
        output_name=run_paths.output_name,
        name_counts=stats.input_names,
    )
    concurrency = settings.concurrency
    if settings.sqs_queue_url:
        from services.augmenter.sources.sqs import SqsWorkers  # noqa: PLC0415
        from services.common.aws_client import open_client  # noqa: PLC0415 - see run_storage.py

        assert isinstance(run_paths.source, S3Uri)  # noqa: S101 - checked with the places
        endpoint = queue_endpoint(settings.sqs_queue_url)
        client = await stack.enter_async_context(
            open_client(
                "sqs", endpoint_url=endpoint.url, region=endpoint.region, max_connections=4 * concurrency
            )
        )
        workers = SqsWorkers(
            client,
            queue_url=settings.sqs_queue_url,
            source=run_paths.source,
            lister=lister,
            runner=runner,
            stats=stats,
            metrics=metrics,
        )
        # Check that INPUT can be listed: with a wrong endpoint, every object would pass for a missing one.
        if settings.missing_input == "skip":
            await anext(storage.source.list(), None)
        await workers.run(concurrency=concurrency, follow=settings.watch, stopping=stopping)
    elif settings.watch:
        watcher = Watcher(
            lambda after: lister.list_tasks(after=after),
            lister.find_task,
            poll_interval_seconds=settings.poll_interval_seconds,
            lookback_seconds=settings.lookback_seconds,
            on_first_listing=partial(empty_input.warn_if_empty, storage.source, stats),
        )
        await runner.run(watcher.tasks(), concurrency=concurrency, stopping=stopping, on_end=watcher.on_end)
    else:
        if run_paths.input_name is None:
            tasks: AsyncIterator[FileTask] = lister.list_tasks()
        else:
            tasks = _list_single_file(lister, run_paths.input_name)
        await runner.run(tasks, concurrency=concurrency, stopping=stopping)


async def _list_single_file(lister: FileLister, name: str) -> AsyncIterator[FileTask]:
    yield await lister.find_task(name)


def _exit_code(settings: RunSettings, stats: RunStats, *, is_empty: bool) -> int:
    if stats.failures.count or is_empty:
        return _EXIT_FAILED
    if settings.dry_run:
        return 0
    rejected = stats.lines.rejected and not settings.ok_rejects
    return _EXIT_INCOMPLETE if rejected or stats.files_archived else 0
