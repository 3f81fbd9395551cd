"""Start OpenTelemetry: sampler, exporter to a collector, and its log lines.

Nothing here waits for a collector. While it cannot be reached, spans are dropped, which is logged once.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState

from services.common import logs
from services.common.compat import override
from services.common.errors import UsageError
from services.common.otel import OtelTracing, current_trace_ids
from services.common.reloading_channel import DNS_REFRESH_OPTIONS
from services.common.tracing import Tracing

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 3.0
_ABORT_SECONDS = 1.0


def start_tracing(service: str) -> tuple[Tracing, Callable[[], None]]:
    """Start tracing as the OTEL_ variables configure it.

    Return it with the function that ends it in bounded time. Raises UsageError.
    """
    error_filter = _silence_otel_logs()
    try:
        exporter = _LoggingExporter(_create_exporter(), error_filter)
        # The variables take precedence over our service name.
        resource = Resource.create().merge(Resource({"service.name": service}))
        provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        provider.sampler = _LinkedSpanSampler(provider.sampler)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except (ValueError, TypeError, OSError) as error:
        message = f"the OTEL_ variables cannot be meant: {type(error).__name__}: {error}"
        raise UsageError(message) from error
    logs.set_trace_id_source(current_trace_ids)

    def close() -> None:
        logs.set_trace_id_source(None)
        # The exporter may wait ten seconds for a collector that cannot be reached, and ten more to flush.
        flush = threading.Thread(target=provider.shutdown, daemon=True)
        flush.start()
        flush.join(_FLUSH_SECONDS)
        if flush.is_alive():
            exporter.shutdown()
            flush.join(_ABORT_SECONDS)

    return OtelTracing(provider.get_tracer("seniority-cache")), close


class _LinkedSpanSampler(Sampler):
    """Samples every batch that serves a sampled caller; else the caller's trace would end in the queue."""

    def __init__(self, default: Sampler) -> None:
        self._default = default

    @override
    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if kind is SpanKind.CONSUMER and links:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._default.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    @override
    def get_description(self) -> str:
        return f"LinkedSpanSampler{{{self._default.get_description()}}}"


class _LoggingExporter(SpanExporter):
    """Sends spans by another exporter, in its thread. Logs once that it fails, and once that it recovered."""

    def __init__(self, exporter: SpanExporter, error_filter: "_ExportErrorFilter") -> None:
        self._exporter = exporter
        self._error_filter = error_filter
        self._is_failing = False

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - see above
            # Traces are never worth more than a log line, whatever the exporter raises.
            result = SpanExportResult.FAILURE
            self._error_filter.last_error = type(error).__name__
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed and not self._is_failing:
            _log.warning(
                "the collector does not take traces, they are dropped: %s", self._error_filter.last_error
            )
        elif self._is_failing and not has_failed:
            _log.info("the collector takes traces again")
        self._is_failing = has_failed
        return result

    @override
    def shutdown(self) -> None:
        self._exporter.shutdown()

    @override
    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _ExportErrorFilter(logging.Filter):
    """Suppresses OpenTelemetry's log line for each failed export and keeps its reason in `last_error`."""

    _CODE = re.compile(r"StatusCode\.([A-Z_]+)|code: (\d{3})\b")

    def __init__(self) -> None:
        super().__init__()
        self.last_error = "no answer"

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        # Only the status code is kept: an address or a header in the line may hold a secret.
        if found := self._CODE.search(record.getMessage()):
            self.last_error = found[1] or f"HTTP {found[2]}"
        return False


def _create_exporter() -> SpanExporter:
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    if name not in os.environ:
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(name, "").strip() or "grpc"
    # Only the exporter in use is imported: the libraries of the other take a tenth of a second.
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc  # noqa: PLC0415

        # The exporter declares a narrower type than gRPC takes.
        return by_grpc.OTLPSpanExporter(channel_options=DNS_REFRESH_OPTIONS)  # type: ignore[arg-type]
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http  # noqa: PLC0415

        return by_http.OTLPSpanExporter()
    message = f"{name} {protocol!r}: traces go by grpc or http/protobuf"
    raise UsageError(message)


def _silence_otel_logs() -> _ExportErrorFilter:
    """Keep only OpenTelemetry's warning about an unknown sampler; return the filter of export errors."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    logging.getLogger("opentelemetry.sdk.trace.sampling").setLevel(logging.WARNING)
    error_filter = _ExportErrorFilter()
    for name in ("proto.grpc.exporter", "proto.http.trace_exporter", "common.http"):
        logger = logging.getLogger(f"opentelemetry.exporter.otlp.{name}")
        logger.setLevel(logging.WARNING)
        logger.addFilter(error_filter)
    return error_filter
