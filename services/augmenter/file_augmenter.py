"""Builds what augments one file: the client of the target, and the pipeline around it."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import stamina

from services.augmenter.client.batching_client import ProxyClient
from services.augmenter.client.channel import ProxyCredentials, open_channel
from services.augmenter.client.retry import OutageLogger, RetryBudget
from services.augmenter.client.rpc import SeniorityClient
from services.augmenter.config import RunSettings
from services.augmenter.domain import FileTask
from services.augmenter.metrics import Metrics
from services.augmenter.pipeline.file_pipeline import Pipeline
from services.augmenter.run_storage import RunStorage
from services.augmenter.stats import LineCounts, RunStats
from services.common.tracing import Tracing


async def build_file_augmenter(
    settings: RunSettings,
    credentials: ProxyCredentials,
    storage: RunStorage,
    stack: AsyncExitStack,
    stats: RunStats,
    metrics: Metrics,
    tracing: Tracing,
) -> Callable[[FileTask], Awaitable[LineCounts]]:
    """Return the function that augments one file. The stack closes its channel to the target.

    Each file has a separate trace that links to the trace of the run: a run may have any number of files,
    and with --watch it does not end.
    """
    # Stamina would log each retry. OutageLogger logs an outage once.
    stamina.instrumentation.set_on_retry_hooks([])
    # Without --dry-run, the settings ensure that there is a target.
    outage_logger = OutageLogger(str(settings.target))
    channel = await stack.enter_async_context(
        open_channel(outage_logger.target, credentials, max_call_seconds=settings.deadline_seconds)
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
    run_context = tracing.current_context()

    async def augment(task: FileTask) -> LineCounts:
        retry_budget = RetryBudget(seconds=settings.retry_budget_seconds, outage_logger=outage_logger)
        uri = storage.source.uri(task.file.name)
        with tracing.start_trace("file", link=run_context, file=uri, bytes=task.file.size_bytes) as span:
            counts = await pipeline.augment(
                task.file,
                output_name=task.output_name,
                expected_version=task.expected_version,
                lines_format=task.lines_format,
                retry_budget=retry_budget,
            )
            span.set_attributes(lines=counts.read, augmented=counts.augmented, rejected=counts.rejected)
            return counts

    return augment
