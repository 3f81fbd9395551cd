"""The interface that the services use to trace their work, and the implementation that does nothing.

`otel.py` implements it with OpenTelemetry. `tracing_setup.py` chooses between the two by the environment.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from services.common.compat import override

AttributeValue = str | int | float | bool
Headers = tuple[tuple[str, str], ...]

CONTEXT_BYTES = 24
"""Size of a span context in bytes: trace id (16), span id (8)."""

MAX_LINKS = 64
"""Maximum number of caller spans that the span of a batch links to. A batch may serve a caller a pair."""


class Span(Protocol):
    """A traced piece of work."""

    def set_attributes(self, **attributes: AttributeValue) -> None:
        """Add counts, sizes and outcomes. A company or a title must never be among them."""

    def set_status(self, code: str) -> None:
        """Record the gRPC status, by its name, of the RPC that this span stands for."""


class Tracing(Protocol):
    """Creates spans. Each method that returns a context manager makes its span current inside the block.

    Spans that are started inside the block become children of the current span.
    """

    @property
    def is_enabled(self) -> bool:
        """Whether spans are recorded at all."""

    def start_trace(
        self, name: str, /, *, link: bytes = b"", **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        """Start a new trace whose root span links to the span context `link`, unless that is empty."""

    def server_span(
        self, name: str, metadata: Sequence[tuple[str, str | bytes]], /
    ) -> AbstractContextManager[Span]:
        """Start the span of a received RPC, in the trace that `traceparent` in its metadata names, if any."""

    def span(self, name: str, /, **attributes: AttributeValue) -> AbstractContextManager[Span]:
        """Start a child of the current span. Do nothing if no sampled span is current."""

    def client_span(self, name: str, /, **attributes: AttributeValue) -> AbstractContextManager[Span]:
        """Start the span of a sent RPC. Do nothing if no sampled span is current."""

    def batch_span(
        self, name: str, contexts: Sequence[bytes], /, **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        """Start a trace for a batch that serves many callers, with a link to the span of each of them.

        `contexts` holds values of `current_context`. They come from Redis and may hold anything: invalid ones
        are ignored. Do nothing if none is valid.
        """

    def current_span(self) -> Span:
        """Return the current span."""

    def current_context(self) -> bytes:
        """Return the context of the current span (CONTEXT_BYTES long), or b"" if it is not sampled."""

    def headers(self) -> Headers:
        """Return the metadata with which the receiver of an RPC continues this trace."""


class _NoopTracing(Span, Tracing):
    """Records nothing. One object serves as tracing and as every span."""

    is_enabled = False

    @override
    def set_attributes(self, **attributes: AttributeValue) -> None:
        pass

    @override
    def set_status(self, code: str) -> None:
        pass

    @override
    def start_trace(
        self, name: str, /, *, link: bytes = b"", **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        return _NOOP_CONTEXT

    @override
    def server_span(
        self, name: str, metadata: Sequence[tuple[str, str | bytes]], /
    ) -> AbstractContextManager[Span]:
        return _NOOP_CONTEXT

    @override
    def span(self, name: str, /, **attributes: AttributeValue) -> AbstractContextManager[Span]:
        return _NOOP_CONTEXT

    client_span = span

    @override
    def batch_span(
        self, name: str, contexts: Sequence[bytes], /, **attributes: AttributeValue
    ) -> AbstractContextManager[Span]:
        return _NOOP_CONTEXT

    @override
    def current_span(self) -> Span:
        return NOOP_SPAN

    @override
    def current_context(self) -> bytes:
        return b""

    @override
    def headers(self) -> Headers:
        return ()


_noop = _NoopTracing()
NOOP_SPAN: Span = _noop
OFF: Tracing = _noop
_NOOP_CONTEXT = nullcontext(NOOP_SPAN)
