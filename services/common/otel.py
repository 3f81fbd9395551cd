"""Traces by OpenTelemetry: spans, their contexts, and the way to a collector.

Imported only where traces are asked for. Nothing here waits for a collector: spans are dropped when it is
gone, which the log says once.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common import logs
from services.common.errors import UsageError
from services.common.reloading_channel import DNS_REFRESH_OPTIONS
from services.common.tracing import (
    CONTEXT_BYTES,
    MAX_LINKS,
    NOOP_SPAN,
    AttributeValue,
    Headers,
    Span,
    Tracing,
)

_log = logging.getLogger(__name__)

_FLUSH_SECONDS, _ABORT_SECONDS = 3.0, 1.0
_MAX_TRACESTATE_CHARACTERS = (
    512  # of `tracestate`, as W3C has whoever passes it on take at least; it is kept with every span
)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_TRACE_ID_BYTES = 16
# A server's own failures; of the others it is the caller who has something to do.
_SERVER_ERROR_CODES = frozenset(
    {
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    }
)
_propagator = TraceContextTextMapPropagator()


class OtelSpan:
    """A span that is recorded."""

    __slots__ = ("_error_codes", "_span")

    def __init__(self, span: trace.Span, *, error_codes: frozenset[str] | None = None) -> None:
        self._span = span
        self._error_codes = error_codes

    def set_attributes(self, **attributes: AttributeValue) -> None:
        """See `Span.note`."""
        self._span.set_attributes(_to_otlp(attributes))

    def set_status(self, code: str) -> None:
        """See `Span.ended_as`: of a call, all but OK is a failure."""
        self._span.set_attribute("code", code)
        if code != "OK" if self._error_codes is None else code in self._error_codes:
            self._span.set_status(Status(StatusCode.ERROR, code))


class OtelTracing:
    """See `Tracing`. What goes on is a context variable, so each task has the one in which it was made."""

    is_enabled = True

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def start_trace(self, name: str, /, *, link: bytes = b"", **attributes: AttributeValue) -> Iterator[Span]:
        """See `Tracing.root`."""
        links = _to_links([link])
        with self._start_span(name, SpanKind.INTERNAL, attributes, context=Context(), links=links) as span:
            yield OtelSpan(span)

    @contextmanager
    def server_span(self, name: str, metadata: Sequence[tuple[str, str | bytes]], /) -> Iterator[Span]:
        """See `Tracing.serve`."""
        carrier = {
            key: value
            for key, value in metadata
            if isinstance(value, str)
            and (key == "traceparent" or (key == "tracestate" and len(value) <= _MAX_TRACESTATE_CHARACTERS))
        }
        context = _propagator.extract(carrier, context=Context())
        rpc: dict[str, AttributeValue] = {"rpc.system": "grpc", "rpc.method": name}
        with self._tracer.start_as_current_span(
            name, context, SpanKind.SERVER, rpc, record_exception=False, set_status_on_exception=False
        ) as span:  # how it ended is told by its status: that is raised, too
            yield OtelSpan(span, error_codes=_SERVER_ERROR_CODES)

    @contextmanager
    def span(self, name: str, /, **attributes: AttributeValue) -> Iterator[Span]:
        """See `Tracing.span`."""
        if not _is_sampled():
            yield NOOP_SPAN
            return
        with self._start_span(name, SpanKind.INTERNAL, attributes) as span:
            yield OtelSpan(span)

    @contextmanager
    def client_span(self, name: str, /, **attributes: AttributeValue) -> Iterator[Span]:
        """See `Tracing.call`."""
        if not _is_sampled():
            yield NOOP_SPAN
            return
        attributes |= {"rpc.system": "grpc", "rpc.method": name}
        with self._start_span(name, SpanKind.CLIENT, attributes) as span:
            yield OtelSpan(span)

    @contextmanager
    def batch_span(
        self, name: str, contexts: Sequence[bytes], /, **attributes: AttributeValue
    ) -> Iterator[Span]:
        """See `Tracing.batch`."""
        links = _to_links(contexts)
        if not links:
            yield NOOP_SPAN
            return
        with self._start_span(name, SpanKind.CONSUMER, attributes, context=Context(), links=links) as span:
            yield OtelSpan(span)

    def current_span(self) -> Span:
        """See `Tracing.current`."""
        return OtelSpan(trace.get_current_span(), error_codes=_SERVER_ERROR_CODES)

    def current_context(self) -> bytes:
        """See `Tracing.here`."""
        if not _is_sampled():
            return b""
        context = trace.get_current_span().get_span_context()
        return context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")

    def headers(self) -> Headers:
        """See `Tracing.headers`."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier)
        return tuple(carrier.items())

    @contextmanager
    def _start_span(
        self,
        name: str,
        kind: SpanKind,
        attributes: dict[str, AttributeValue],
        *,
        context: Context | None = None,
        links: Sequence[Link] = (),
    ) -> Iterator[trace.Span]:
        """A span that tells of an exception its type alone: its words may hold what a caller sent."""
        with self._tracer.start_as_current_span(
            name,
            context,
            kind,
            _to_otlp(attributes),
            links,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise


def _to_otlp(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    """As OTLP takes them: a number over 64 bits or half a character would cost all spans that go with it."""
    return {name: _CONVERTERS.get(type(value), _unchanged)(value) for name, value in attributes.items()}


def _unchanged(value: AttributeValue) -> AttributeValue:
    return value


_CONVERTERS: dict[type, Callable[[Any], AttributeValue]] = {
    int: lambda number: max(-(2**63), min(2**63 - 1, number)),
    str: lambda text: text.encode(errors="replace").decode(),
}


def _is_sampled() -> bool:
    context = trace.get_current_span().get_span_context()
    return context.is_valid and context.trace_flags.sampled


def _to_links(contexts: Sequence[bytes]) -> list[Link]:
    """To those of them that are contexts, the first MAX_LINKS; only what is sampled is ever passed on."""
    found: dict[bytes, Link] = {}
    for context in contexts:
        if len(found) == MAX_LINKS:
            break
        if isinstance(context, bytes) and len(context) == CONTEXT_BYTES:
            trace_id = int.from_bytes(context[:_TRACE_ID_BYTES], "big")
            span_id = int.from_bytes(context[_TRACE_ID_BYTES:], "big")
            linked = SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED)
            if linked.is_valid:
                found[context] = Link(linked)
    return list(found.values())


class _LinkedSpanSampler(Sampler):
    """Samples a batch for which a sampled caller waits, or its trace would end in the queue."""

    def __init__(self, others: Sampler) -> None:
        self._default = others

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
        """See `Sampler`."""
        if kind is SpanKind.CONSUMER and links:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._default.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """See `Sampler`."""
        return f"WithTheLinked{{{self._default.get_description()}}}"


class _LoggingExporter(SpanExporter):
    """Sends spans by another exporter, in a thread of its own; says once that it fails, and once that it
    does again what it should.
    """  # noqa: D205 - one thought

    def __init__(self, exporter: SpanExporter, reason: "_ExportErrorFilter") -> None:
        self._exporter = exporter
        self._error_filter = reason
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - whatever it is: traces are never worth more than a line
            result = SpanExportResult.FAILURE
            self._error_filter.last_error = type(error).__name__
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._is_failing:
            _log.warning(
                "the collector does not take traces, they are dropped: %s", self._error_filter.last_error
            )
        elif self._is_failing and not fails:
            _log.info("the collector takes traces again")
        self._is_failing = fails
        return result

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `SpanExporter`."""
        return self._exporter.force_flush(timeout_millis)


class _ExportErrorFilter(logging.Filter):
    """Takes OpenTelemetry's own lines of failed exports, which come one a try, for our one."""

    _CODE = re.compile(r"StatusCode\.([A-Z_]+)|code: (\d{3})\b")

    def __init__(self) -> None:
        super().__init__()
        self.last_error = "no answer"

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the code alone: an address or a header may hold a secret."""
        if found := self._CODE.search(record.getMessage()):
            self.last_error = found[1] or f"HTTP {found[2]}"
        return False


def start_tracing(service: str) -> tuple[Tracing, Callable[[], None]]:
    """Tracing by the OTEL_ variables, and what ends it in bounded time. Raises UsageError."""
    reason = _silence_otel_logs()
    try:
        exporter = _LoggingExporter(_create_exporter(), reason)
        # The variables win over the name that we would give.
        resource = Resource.create().merge(Resource({"service.name": service}))
        provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        provider.sampler = _LinkedSpanSampler(provider.sampler)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except (ValueError, TypeError, OSError) as error:
        message = f"the OTEL_ variables cannot be meant: {type(error).__name__}: {error}"
        raise UsageError(message) from error
    logs.set_trace_id_source(_current_trace_ids)

    def close() -> None:
        logs.set_trace_id_source(None)
        # It may be about to wait ten seconds for a collector that is gone; and the next ten for what is left.
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        if flushing.is_alive():
            exporter.shutdown()
            flushing.join(_ABORT_SECONDS)

    return OtelTracing(provider.get_tracer("seniority-cache")), close


def _create_exporter() -> SpanExporter:
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    if name not in os.environ:
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(name, "").strip() or "grpc"
    # Either is imported when it is asked for: the other's libraries take a tenth of a second to come.
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc  # noqa: PLC0415

        return by_grpc.OTLPSpanExporter(channel_options=DNS_REFRESH_OPTIONS)  # type: ignore[arg-type]  # too narrow
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http  # noqa: PLC0415

        return by_http.OTLPSpanExporter()
    message = f"{name} {protocol!r}: traces go by grpc or http/protobuf"
    raise UsageError(message)


def _silence_otel_logs() -> _ExportErrorFilter:
    """Of OpenTelemetry's own log leave what it says of a sampler that it does not know."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    logging.getLogger("opentelemetry.sdk.trace.sampling").setLevel(logging.WARNING)
    reason = _ExportErrorFilter()
    for name in ("proto.grpc.exporter", "proto.http.trace_exporter", "common.http"):
        exporting = logging.getLogger(f"opentelemetry.exporter.otlp.{name}")
        exporting.setLevel(logging.WARNING)
        exporting.addFilter(reason)
    return reason


def _current_trace_ids() -> tuple[str, str] | None:
    context = trace.get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
