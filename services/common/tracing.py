"""Traces, if the standard variables of OpenTelemetry ask for them; else nothing of it is even imported.

What the services know of tracing is `Tracing`; `otel.py` does it, and `OFF` does nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from services.common.errors import UsageError

AttributeValue = str | int | float | bool
Headers = tuple[tuple[str, str], ...]

CONTEXT_BYTES = 24
"""Of a span's context as bytes: the trace's id (16), the span's (8)."""

MAX_LINKS = 64
"""Callers that a batch's span names, of up to as many as it has pairs."""

_ENABLING_VARIABLES = (
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)


class Span(Protocol):
    """A piece of work that is traced."""

    def set_attributes(self, **attributes: AttributeValue) -> None:
        """Add counts, sizes, outcomes: never a company or a title."""

    def set_status(self, code: str) -> None:
        """Note the status, by its name, of the RPC that this is."""


class Tracing(Protocol):
    """What is told of the work that goes on. A block's span is the one that others begun in it are under."""

    @property
    def is_enabled(self) -> bool:
        """Whether anything is told at all."""

    def start_trace(
        self, name: str, /, *, link: bytes = b"", **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        """A trace of its own, which names the span whose context is `beside`."""

    def server_span(
        self, name: str, metadata: Sequence[tuple[str, str | bytes]], /
    ) -> AbstractContextManager[Span]:
        """An RPC of somebody's, in the caller's trace if its metadata (`traceparent`) says which."""

    def span(self, name: str, /, **attributes: AttributeValue) -> AbstractContextManager[Span]:
        """A part of what goes on; nothing where that is not traced."""

    def client_span(self, name: str, /, **attributes: AttributeValue) -> AbstractContextManager[Span]:
        """An RPC to somebody; nothing where that is not traced."""

    def batch_span(
        self, name: str, contexts: Sequence[bytes], /, **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        """Work for many at once: a trace of its own, which names theirs; nothing if nobody's is traced.

        `contexts` are as `here` gave them, and come from anywhere: what is no context is passed over.
        """

    def current_span(self) -> Span:
        """The span of what goes on."""

    def current_context(self) -> bytes:
        """The context of what goes on, in CONTEXT_BYTES; empty where that is not traced."""

    def headers(self) -> Headers:
        """Metadata with which whoever is called goes on with the trace."""


class _NoopTracing:
    """Tells nothing: one object for all that needs none."""

    is_enabled = False

    def set_attributes(self, **attributes: AttributeValue) -> None:
        """See `Span.note`."""

    def set_status(self, code: str) -> None:
        """See `Span.ended_as`."""

    def start_trace(
        self,
        _name: str,
        /,
        *,
        link: bytes = b"",  # noqa: ARG002 - by its name
        **_attributes: AttributeValue,
    ) -> AbstractContextManager[Span]:
        """See `Tracing.root`."""
        return _NOOP_CONTEXT

    def server_span(
        self, _name: str, _metadata: Sequence[tuple[str, str | bytes]], /
    ) -> AbstractContextManager[Span]:
        """See `Tracing.serve`."""
        return _NOOP_CONTEXT

    def span(self, _name: str, /, **_attributes: AttributeValue) -> AbstractContextManager[Span]:
        """See `Tracing.span`."""
        return _NOOP_CONTEXT

    client_span = span

    def batch_span(
        self, _name: str, _contexts: Sequence[bytes], /, **_attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        """See `Tracing.batch`."""
        return _NOOP_CONTEXT

    def current_span(self) -> Span:
        """See `Tracing.current`."""
        return NOOP_SPAN

    def current_context(self) -> bytes:
        """See `Tracing.here`."""
        return b""

    def headers(self) -> Headers:
        """See `Tracing.headers`."""
        return ()


_noop = _NoopTracing()
NOOP_SPAN: Span = _noop
OFF: Tracing = _noop
_NOOP_CONTEXT = nullcontext(NOOP_SPAN)


def requested_by(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for traces. Raises UsageError: for an exporter that we do not have."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporters = [
        name.strip().lower()
        for name in environment.get(_ENABLING_VARIABLES[0], "").split(",")
        if name.strip()
    ]
    if unknown := sorted(set(exporters) - {"otlp", "none"}):
        message = f"OTEL_TRACES_EXPORTER {unknown[0]!r}: traces go by otlp, or none"
        raise UsageError(message)
    if "none" in exporters:
        return None
    return next((name for name in _ENABLING_VARIABLES if environment.get(name, "").strip()), None)


@contextmanager
def tracing_context(service: str) -> Iterator[Tracing]:
    """Traces of this process for as long as the block lasts, sent in bounded time at its end.

    `service` is its name where OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES give none. Raises UsageError.
    """
    asking = requested_by(os.environ)
    if asking is None:
        yield OFF
        return
    try:
        from services.common import otel  # noqa: PLC0415 - not where nobody asks for it

        tracing, close = otel.start_tracing(service)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("services"):
            raise
        message = (
            f"{asking} asks for traces, but {error.name} is not installed; run: pip install '.[tracing]'"
        )
        raise UsageError(message) from error
    try:
        yield tracing
    finally:
        close()
