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
from services.augmenter.client.channel import Access, open_channel
from services.augmenter.client.retry import RetryBudget, TargetHealth
from services.augmenter.client.rpc import SeniorityRpc
from services.augmenter.config import RunSettings
from services.augmenter.dry_run import DryRun
from services.augmenter.errors import TerminatedError
from services.augmenter.metrics import Metrics
from services.augmenter.paths import Plan, S3Place
from services.augmenter.pipeline import allocator
from services.augmenter.pipeline.file_pipeline import Pipeline
from services.augmenter.run_storage import Stores, open_stores
from services.augmenter.runner import Runner
from services.augmenter.sources import empty_input
from services.augmenter.sources.listing import Job, Jobs, Shard
from services.augmenter.sources.queue_url import queue_endpoint
from services.augmenter.sources.watch import Watcher
from services.augmenter.stats import LineCounts, Totals
from services.common.signals import Signals
from services.common.tracing import OFF, Span, Tracing

PROGRAM = "augmenter"
GRACE_SECONDS = 20.0  # of the 30 that Kubernetes gives
_EXIT_FAILED, _EXIT_INCOMPLETE = 1, 3
_log = logging.getLogger(PROGRAM)


async def run(settings: RunSettings, plan: Plan, tracing: Tracing = OFF) -> int:
    """Do what INPUT has now, or go on for what comes; the exit code. Raises CommandError."""
    access = Access.read(settings.tls, token_file=settings.token_file)
    allocator.settle()
    signals = Signals(grace_seconds=GRACE_SECONDS if settings.watch else 0)
    try:
        with tracing.root("augmenter.run", watch=settings.watch) as span:
            return await _run(settings, plan, access, signals.stopping, tracing, span)
    except asyncio.CancelledError:
        if not signals.stopping.is_set():
            raise
        if settings.watch:  # what was in work is abandoned, whole: it will be found again
            return 0
        raise TerminatedError("stopped by SIGTERM; run again to go on") from None


async def _run(
    settings: RunSettings, plan: Plan, access: Access, stopping: asyncio.Event, tracing: Tracing, span: Span
) -> int:
    totals, registry = Totals(), CollectorRegistry()
    metrics = Metrics(registry)
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        if settings.http_listen:
            from services.common.http_server import HttpEndpoint  # noqa: PLC0415 - see stores.py

            http = HttpEndpoint(registry=registry)
            stack.push_async_callback(http.close)
            _log.info("metrics on http://%s/metrics", await http.start(settings.http_listen))
        stores = await open_stores(settings, plan, stack)
        shown = sys.stderr.isatty() if settings.progress is None else settings.progress
        if shown:
            from services.augmenter.progress import progress_bar  # noqa: PLC0415 - see stores.py

            await stack.enter_async_context(progress_bar(totals))
        counting = DryRun(
            source=stores.source,
            totals=totals,
            limits=settings.read_limits,
            form=settings.posting_format,
        )
        work: Callable[[Job], Awaitable[LineCounts]] = counting.count
        if not settings.dry_run:
            await stores.sink.prepare()
            work = await _augmenting(settings, access, stores, stack, totals, metrics, tracing)
        runner = Runner(
            source=stores.source,
            work=work,
            totals=totals,
            metrics=metrics,
            tell_failures=settings.watch,
            skip_missing=settings.missing_input == "skip",
        )
        await _do_all(settings, plan, stores, runner, totals, metrics, stopping, stack)
        was_listed = not (settings.watch or settings.sqs_queue_url or plan.input_name or stopping.is_set())
        nothing = (
            "" if settings.ok_empty or not was_listed else await empty_input.reason(stores.source, totals)
        )
    totals.seconds = time.monotonic() - started
    span.note(done=totals.done, skipped=totals.skipped, failed=totals.failures.count)
    summary.write_failures(totals, program=PROGRAM)
    if settings.dry_run:
        sys.stdout.write(summary.dry_run_summary(totals, distinct=counting.distinct))
    else:
        sys.stdout.write(summary.summary(totals, rejects_place=stores.rejects.place("")))
    if settings.summary_json:
        summary.write_summary_json(totals, settings.summary_json)
    if nothing:
        sys.stderr.write(f"{PROGRAM}: {nothing}\n")
    return 0 if settings.watch else _exit_code(settings, totals, is_empty=nothing != "")


async def _do_all(
    settings: RunSettings,
    plan: Plan,
    stores: Stores,
    runner: Runner,
    totals: Totals,
    metrics: Metrics,
    stopping: asyncio.Event,
    stack: AsyncExitStack,
) -> None:
    """Every file, wherever its name comes from."""
    jobs = Jobs(
        stores.source,
        stores.sink,
        shard=Shard(*settings.shard),
        overwrite=settings.overwrite,
        output_name=plan.output_name,
        listing=totals.listing,
    )
    concurrency = settings.concurrency
    if settings.sqs_queue_url:
        from services.augmenter.sources.sqs import QueueWorkers  # noqa: PLC0415
        from services.common.storage.s3_client import aws_client  # noqa: PLC0415 - see stores.py

        assert isinstance(plan.source, S3Place)  # noqa: S101 - checked with the places
        endpoint = queue_endpoint(settings.sqs_queue_url)
        client = await stack.enter_async_context(
            aws_client("sqs", endpoint_url=endpoint.url, region=endpoint.region, connections=4 * concurrency)
        )
        workers = QueueWorkers(
            client,
            queue_url=settings.sqs_queue_url,
            source=plan.source,
            jobs=jobs,
            runner=runner,
            totals=totals,
            metrics=metrics,
        )
        if settings.missing_input == "skip":  # else a wrong endpoint would make every object a missing one
            await anext(stores.source.list(), None)
        await workers.run(concurrency=concurrency, endless=settings.watch, stopping=stopping)
    elif settings.watch:
        watcher = Watcher(
            lambda after: jobs.all(after=after),
            jobs.named,
            poll_interval_seconds=settings.poll_interval_seconds,
            lookback_seconds=settings.lookback_seconds,
            first_listed=partial(empty_input.warn, stores.source, totals),
        )
        await runner.run(watcher.jobs(), concurrency=concurrency, stopping=stopping, ended=watcher.ended)
    else:
        found = jobs.all() if plan.input_name is None else _single(jobs, plan.input_name)
        await runner.run(found, concurrency=concurrency, stopping=stopping)


async def _single(jobs: Jobs, name: str) -> AsyncIterator[Job]:
    yield await jobs.named(name)


def _exit_code(settings: RunSettings, totals: Totals, *, is_empty: bool) -> int:
    if totals.failures.count or is_empty:
        return _EXIT_FAILED
    if settings.dry_run:
        return 0
    rejected = totals.lines.rejected and not settings.ok_rejects
    return _EXIT_INCOMPLETE if rejected or totals.archived else 0


async def _augmenting(
    settings: RunSettings,
    access: Access,
    stores: Stores,
    stack: AsyncExitStack,
    totals: Totals,
    metrics: Metrics,
    tracing: Tracing,
) -> Callable[[Job], Awaitable[LineCounts]]:
    """The work to be done on each file, with a channel that the stack closes.

    A file is a trace of its own beside the run's: a run may have any number of them, and with --watch no end.
    """
    stamina.instrumentation.set_on_retry_hooks([])  # a line a retry is too many: RetryBudget tells
    health = TargetHealth(str(settings.target))  # there is one, but in a dry run
    channel = await stack.enter_async_context(
        open_channel(health.target, access, longest_call_seconds=settings.deadline_seconds)
    )
    rpc = SeniorityRpc(
        channel,
        caller=settings.caller,
        priority=settings.priority,
        deadline_seconds=settings.deadline_seconds,
        totals=totals,
        metrics=metrics,
        token=access.token,
        tracing=tracing,
    )
    pipeline = Pipeline(
        source=stores.source,
        sink=stores.sink,
        rejects=stores.rejects,
        client=ProxyClient(rpc, batch_size=settings.batch_size, totals=totals),
        totals=totals,
        tracing=tracing,
        limits=settings.read_limits,
        form=settings.posting_format,
    )
    run = tracing.here()

    async def augment(job: Job) -> LineCounts:
        budget = RetryBudget(seconds=settings.retry_budget_seconds, health=health)
        place = stores.source.place(job.item.name)
        with tracing.root("file", beside=run, file=place, bytes=job.item.size_bytes) as span:
            counts = await pipeline.augment(
                job.item,
                output_name=job.output_name,
                onto=job.onto,
                lines_format=job.lines_format,
                budget=budget,
            )
            span.note(lines=counts.read, augmented=counts.augmented, rejected=counts.rejected)
            return counts

    return augment
