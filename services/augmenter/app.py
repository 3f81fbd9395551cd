"""The composition root: builds what a run needs, runs it, tells what came out."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import stamina
from prometheus_client import CollectorRegistry

from services.augmenter import summary
from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.channel import ProxyCredentials, open_channel
from services.augmenter.client.retry import OutageLogger, RetryBudget
from services.augmenter.client.rpc import SeniorityClient
from services.augmenter.config import RunSettings
from services.augmenter.dry_run import DryRunCounter
from services.augmenter.errors import TerminatedError
from services.augmenter.metrics import Metrics
from services.augmenter.paths import RunPaths, S3Uri
from services.augmenter.pipeline import allocator
from services.augmenter.pipeline.file_pipeline import Pipeline
from services.augmenter.run_storage import RunStorage, open_run_storage
from services.augmenter.runner import Runner
from services.augmenter.sources import empty_input
from services.augmenter.sources.listing import FileLister, FileTask, Shard
from services.augmenter.sources.queue_url import queue_endpoint
from services.augmenter.sources.watch import Watcher
from services.augmenter.stats import LineCounts, RunStats
from services.common.signals import ShutdownSignal
from services.common.tracing import OFF, Span, Tracing

PROGRAM = "augmenter"
GRACE_SECONDS = 20.0  # of the 30 that Kubernetes gives
_EXIT_FAILED, _EXIT_INCOMPLETE = 1, 3
_log = logging.getLogger(PROGRAM)


async def run(settings: RunSettings, run_paths: RunPaths, tracing: Tracing = OFF) -> int:
    """Do what INPUT has now, or go on for what comes; the exit code. Raises CommandError."""
    access = ProxyCredentials.load(settings.tls_files, token_file=settings.token_file)
    allocator.tune_allocator()
    signals = ShutdownSignal(grace_seconds=GRACE_SECONDS if settings.watch else 0)
    try:
        with tracing.start_trace("augmenter.run", watch=settings.watch) as span:
            return await _run(settings, run_paths, access, signals.stopping, tracing, span)
    except asyncio.CancelledError:
        if not signals.stopping.is_set():
            raise
        if settings.watch:  # what was in work is abandoned, whole: it will be found again
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
    totals, registry = RunStats(), CollectorRegistry()
    metrics = Metrics(registry)
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        if settings.http_listen:
            from services.common.http_server import HttpEndpoint  # noqa: PLC0415 - see stores.py

            http = HttpEndpoint(registry=registry)
            stack.push_async_callback(http.close)
            _log.info("metrics on http://%s/metrics", await http.start(settings.http_listen))
        stores = await open_run_storage(settings, run_paths, stack)
        shown = sys.stderr.isatty() if settings.progress is None else settings.progress
        if shown:
            from services.augmenter.progress import progress_bar  # noqa: PLC0415 - see stores.py

            await stack.enter_async_context(progress_bar(totals))
        counting = DryRunCounter(
            source=stores.source,
            stats=totals,
            limits=settings.read_limits,
            posting_format=settings.posting_format,
        )
        work: Callable[[FileTask], Awaitable[LineCounts]] = counting.count_file
        if not settings.dry_run:
            await stores.sink.check_writable()
            work = await _build_augment_file(settings, credentials, stores, stack, totals, metrics, tracing)
        runner = Runner(
            source=stores.source,
            process_file=work,
            stats=totals,
            metrics=metrics,
            log_failures=settings.watch,
            skip_missing=settings.missing_input == "skip",
        )
        await _process_files(settings, run_paths, stores, runner, totals, metrics, stopping, stack)
        was_listed = not (
            settings.watch or settings.sqs_queue_url or run_paths.input_name or stopping.is_set()
        )
        nothing = (
            ""
            if settings.ok_empty or not was_listed
            else await empty_input.explain_empty_input(stores.source, totals)
        )
    totals.seconds = time.monotonic() - started
    span.set_attributes(done=totals.files_done, skipped=totals.files_skipped, failed=totals.failures.count)
    summary.write_failures(totals, program=PROGRAM)
    if settings.dry_run:
        sys.stdout.write(summary.format_dry_run_summary(totals, distinct_pairs=counting.distinct_pairs))
    else:
        sys.stdout.write(summary.format_summary(totals, rejects_uri=stores.rejects.uri("")))
    if settings.summary_json:
        summary.write_summary_json(totals, settings.summary_json)
    if nothing:
        sys.stderr.write(f"{PROGRAM}: {nothing}\n")
    return 0 if settings.watch else _exit_code(settings, totals, is_empty=nothing != "")


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
    """Every file, wherever its name comes from."""
    jobs = FileLister(
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
        from services.common.storage.s3_client import aws_client  # noqa: PLC0415 - see stores.py

        assert isinstance(run_paths.source, S3Uri)  # noqa: S101 - checked with the places
        endpoint = queue_endpoint(settings.sqs_queue_url)
        client = await stack.enter_async_context(
            aws_client(
                "sqs", endpoint_url=endpoint.url, region=endpoint.region, max_connections=4 * concurrency
            )
        )
        workers = SqsWorkers(
            client,
            queue_url=settings.sqs_queue_url,
            source=run_paths.source,
            lister=jobs,
            runner=runner,
            stats=stats,
            metrics=metrics,
        )
        if settings.missing_input == "skip":  # else a wrong endpoint would make every object a missing one
            await anext(storage.source.list(), None)
        await workers.run(concurrency=concurrency, follow=settings.watch, stopping=stopping)
    elif settings.watch:
        watcher = Watcher(
            lambda after: jobs.list_tasks(after=after),
            jobs.find_task,
            poll_interval_seconds=settings.poll_interval_seconds,
            lookback_seconds=settings.lookback_seconds,
            on_first_listing=partial(empty_input.warn_if_empty, storage.source, stats),
        )
        await runner.run(watcher.tasks(), concurrency=concurrency, stopping=stopping, on_end=watcher.on_end)
    else:
        found = (
            jobs.list_tasks()
            if run_paths.input_name is None
            else _list_single_file(jobs, run_paths.input_name)
        )
        await runner.run(found, concurrency=concurrency, stopping=stopping)


async def _list_single_file(lister: FileLister, name: str) -> AsyncIterator[FileTask]:
    yield await lister.find_task(name)


def _exit_code(settings: RunSettings, stats: RunStats, *, is_empty: bool) -> int:
    if stats.failures.count or is_empty:
        return _EXIT_FAILED
    if settings.dry_run:
        return 0
    rejected = stats.lines.rejected and not settings.ok_rejects
    return _EXIT_INCOMPLETE if rejected or stats.files_archived else 0


async def _build_augment_file(
    settings: RunSettings,
    credentials: ProxyCredentials,
    storage: RunStorage,
    stack: AsyncExitStack,
    stats: RunStats,
    metrics: Metrics,
    tracing: Tracing,
) -> Callable[[FileTask], Awaitable[LineCounts]]:
    """The work to be done on each file, with a channel that the stack closes.

    A file is a trace of its own beside the run's: a run may have any number of them, and with --watch no end.
    """
    stamina.instrumentation.set_on_retry_hooks([])  # a line a retry is too many: RetryBudget tells
    health = OutageLogger(str(settings.target))  # there is one, but in a dry run
    channel = await stack.enter_async_context(
        open_channel(health.target, credentials, max_call_seconds=settings.deadline_seconds)
    )
    rpc = SeniorityClient(
        channel,
        caller=settings.caller,
        priority=settings.priority,
        deadline_seconds=settings.deadline_seconds,
        stats=stats,
        metrics=metrics,
        token=credentials.token,
        tracing=tracing,
    )
    pipeline = Pipeline(
        source=storage.source,
        sink=storage.sink,
        rejects=storage.rejects,
        client=ProxyClient(rpc, batch_size=settings.batch_size, stats=stats),
        stats=stats,
        tracing=tracing,
        limits=settings.read_limits,
        posting_format=settings.posting_format,
    )
    run = tracing.current_context()

    async def augment(job: FileTask) -> LineCounts:
        budget = RetryBudget(seconds=settings.retry_budget_seconds, outage_logger=health)
        place = storage.source.uri(job.file.name)
        with tracing.start_trace("file", link=run, file=place, bytes=job.file.size_bytes) as span:
            counts = await pipeline.augment(
                job.file,
                output_name=job.output_name,
                expected_version=job.expected_version,
                lines_format=job.lines_format,
                retry_budget=budget,
            )
            span.set_attributes(lines=counts.read, augmented=counts.augmented, rejected=counts.rejected)
            return counts

    return augment
