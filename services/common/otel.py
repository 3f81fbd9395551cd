"""Spans and span contexts by OpenTelemetry. Imported only where tracing is on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.compat import override
from services.common.tracing import (
    CONTEXT_BYTES,
    MAX_LINKS,
    NOOP_SPAN,
    AttributeValue,
    Headers,
    Span,
    Tracing,
)

# W3C requires that at least this many characters of `tracestate` are passed on. A longer one is dropped,
# because it is stored with every span.
_MAX_TRACESTATE_CHARACTERS = 512
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_TRACE_ID_BYTES = 16
# The statuses that are failures of the server. With any other status the caller has to change something.
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


class OtelSpan(Span):
    """A recorded span. `error_codes` are the statuses that make it an error; None: all but OK."""

    def __init__(self, span: trace.Span, *, error_codes: frozenset[str] | None = None) -> None:
        self._span = span
        self._error_codes = error_codes

    @override
    def set_attributes(self, **attributes: AttributeValue) -> None:
        self._span.set_attributes(_to_otlp(attributes))

    @override
    def set_status(self, code: str) -> None:
        self._span.set_attribute("code", code)
        is_error = code != "OK" if self._error_codes is None else code in self._error_codes
        if is_error:
            self._span.set_status(Status(StatusCode.ERROR, code))


class OtelTracing(Tracing):
    """Records spans. The current span is a context variable: a task inherits it from where it is created."""

    is_enabled = True

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    @override
    @contextmanager
    def start_trace(self, name: str, /, *, link: bytes = b"", **attributes: AttributeValue) -> Iterator[Span]:
        links = _to_links([link])
        with self._start_span(name, SpanKind.INTERNAL, attributes, context=Context(), links=links) as span:
            yield OtelSpan(span)

    @override
    @contextmanager
    def server_span(self, name: str, metadata: Sequence[tuple[str, str | bytes]], /) -> Iterator[Span]:
        carrier = {
            key: value
            for key, value in metadata
            if isinstance(value, str)
            and (key == "traceparent" or (key == "tracestate" and len(value) <= _MAX_TRACESTATE_CHARACTERS))
        }
        context = _propagator.extract(carrier, context=Context())
        rpc: dict[str, AttributeValue] = {"rpc.system": "grpc", "rpc.method": name}
        # An aborted RPC raises, too. Its outcome is the status that `set_status` gets, not the exception.
        with self._tracer.start_as_current_span(
            name, context, SpanKind.SERVER, rpc, record_exception=False, set_status_on_exception=False
        ) as span:
            yield OtelSpan(span, error_codes=_SERVER_ERROR_CODES)

    @override
    @contextmanager
    def span(self, name: str, /, **attributes: AttributeValue) -> Iterator[Span]:
        if not _is_sampled():
            yield NOOP_SPAN
            return
        with self._start_span(name, SpanKind.INTERNAL, attributes) as span:
            yield OtelSpan(span)

    @override
    @contextmanager
    def client_span(self, name: str, /, **attributes: AttributeValue) -> Iterator[Span]:
        if not _is_sampled():
            yield NOOP_SPAN
            return
        attributes |= {"rpc.system": "grpc", "rpc.method": name}
        with self._start_span(name, SpanKind.CLIENT, attributes) as span:
            yield OtelSpan(span)

    @override
    @contextmanager
    def batch_span(
        self, name: str, contexts: Sequence[bytes], /, **attributes: AttributeValue
    ) -> Iterator[Span]:
        links = _to_links(contexts)
        if not links:
            yield NOOP_SPAN
            return
        with self._start_span(name, SpanKind.CONSUMER, attributes, context=Context(), links=links) as span:
            yield OtelSpan(span)

    @override
    def current_span(self) -> Span:
        return OtelSpan(trace.get_current_span(), error_codes=_SERVER_ERROR_CODES)

    @override
    def current_context(self) -> bytes:
        if not _is_sampled():
            return b""
        context = trace.get_current_span().get_span_context()
        return context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")

    @override
    def headers(self) -> Headers:
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
        """Start a span that records only the type of an exception: its text may hold a caller's data."""
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


def current_trace_ids() -> tuple[str, str] | None:
    """Return the trace id and the span id of the current span in hex, or None."""
    context = trace.get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


def _to_otlp(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    """Return the attributes as OTLP can encode them.

    An integer over 64 bits or a lone surrogate would make the exporter drop all spans of the same request.
    """
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
    """Return a link to each distinct valid context, at most MAX_LINKS.

    Only sampled contexts are ever passed on, so each link is marked as sampled.
    """
    links: dict[bytes, Link] = {}
    for context in contexts:
        if len(links) == MAX_LINKS:
            break
        if isinstance(context, bytes) and len(context) == CONTEXT_BYTES:
            trace_id = int.from_bytes(context[:_TRACE_ID_BYTES], "big")
            span_id = int.from_bytes(context[_TRACE_ID_BYTES:], "big")
            span_context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED)
            if span_context.is_valid:
                links[context] = Link(span_context)
    return list(links.values())
