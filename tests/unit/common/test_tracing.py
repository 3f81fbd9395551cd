"""Test tracing: what turns it on, which contexts are accepted, what is sampled and recorded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.common.errors import UsageError
from services.common.tracing import MAX_LINKS, NOOP_SPAN, OFF, Tracing
from services.common.tracing_setup import requested_by, tracing_context

_TRACE = "0af7651916cd43dd8448eb211c80319c"
_SPAN = "b7ad6b7169203331"
_SAMPLED = (("traceparent", f"00-{_TRACE}-{_SPAN}-01"),)


@pytest.fixture(autouse=True)
def _unreachable_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send spans to a closed port, with a timeout too short to be noticed."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.05")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "True"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "false"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, None),
    ],
)
def test_endpoint_or_exporter_turns_tracing_on_unless_disabled(
    variables: dict[str, str], expected: str | None
) -> None:
    """`none` and the SDK's own switch take precedence over an endpoint or an exporter's name."""
    assert requested_by(variables) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier pigeon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
    ],
)
def test_invalid_variable_is_usage_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error (exit code 2) names the value."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=value), tracing_context("test"):
        pass


def test_missing_opentelemetry_is_usage_error_with_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is requested and OpenTelemetry is not installed: exit code 2 and how to install it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("services.common.otel", "services.common.otel_setup"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UsageError) as error, tracing_context("test"):
        pass
    assert error.value.exit_code == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in str(error.value)
    assert str(error.value).endswith("run: pip install '.[tracing]'")


def test_disabled_tracing_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request for traces, spans record nothing and RPCs carry no headers."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    with (
        tracing_context("test") as off,
        off.start_trace("a"),
        off.server_span("b", _SAMPLED),
        off.batch_span("c", [b""]) as span,
    ):
        assert off is OFF
        assert span is NOOP_SPAN
        assert (off.current_context(), off.headers(), off.is_enabled) == (b"", (), False)


def test_callers_trace_is_continued_to_the_model() -> None:
    """The span of an RPC and its children are in the caller's trace; headers name the innermost span."""
    with tracing_context("test") as on, on.server_span("rpc", _SAMPLED):
        server_context = on.current_context()
        with on.client_span("model"):
            client_context = on.current_context()
            [(name, value)] = on.headers()
    assert (name, value) == ("traceparent", f"00-{_TRACE}-{client_context[16:].hex()}-01")
    assert server_context[:16].hex() == client_context[:16].hex() == _TRACE
    assert len({server_context[16:], client_context[16:], bytes.fromhex(_SPAN)}) == 3


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        f"00-{_TRACE}-{_SPAN}",
        f"00-{'0' * 32}-{_SPAN}-01",
        f"ff-{_TRACE}-{_SPAN}-01",
        "\x00" * 55,
        "x" * 8000,
    ],
)
def test_invalid_traceparent_starts_new_trace(traceparent: str) -> None:
    """An invalid W3C context is treated as none."""
    with tracing_context("test") as on, on.server_span("rpc", (("traceparent", traceparent),)):
        assert on.current_context()[:16].hex() not in {_TRACE, ""}


def test_long_tracestate_is_dropped() -> None:
    """A short `tracestate` is passed on to the model; a long one would be stored with every span."""
    with tracing_context("test") as on:
        with on.server_span("rpc", (*_SAMPLED, ("tracestate", "a=b"))):
            assert dict(on.headers())["tracestate"] == "a=b"
        long = ",".join(f"{key}={'b' * 200}" for key in "abcd")
        with on.server_span("rpc", (*_SAMPLED, ("tracestate", long))):
            assert "tracestate" not in dict(on.headers())


def test_unsampled_caller_records_nothing() -> None:
    """No span is recorded or queued, and headers say that the trace is not sampled."""
    unsampled = (("traceparent", f"00-{_TRACE}-{_SPAN}-00"),)
    with tracing_context("test") as on, on.server_span("rpc", unsampled), on.span("part") as part:
        assert part is NOOP_SPAN
        assert on.current_context() == b""
        assert dict(on.headers())["traceparent"].endswith("-00")


@contextmanager
def _batch(on: Tracing, contexts: list[object]) -> Iterator[list[tuple[int, int]]]:
    """Yield the links of a batch's span as (trace id, span id)."""
    from opentelemetry import trace  # noqa: PLC0415 - only where tracing is on, as the code does

    # Redis may hand over values of any type.
    with on.batch_span("batch", contexts):  # type: ignore[arg-type]
        links = getattr(trace.get_current_span(), "links", ())
        yield [(link.context.trace_id, link.context.span_id) for link in links]


def test_batch_span_links_to_valid_contexts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has its own trace with one link for each caller, sampled as they are; invalid ones are ignored.

    The configured sampler applies to other traces only.
    """
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    one, other = bytes(range(24)), bytes(range(1, 25))
    invalid: list[object] = [b"", b"short", bytes(24), bytes(16) + b"12345678", "text" * 6, None, 7, [one]]
    with tracing_context("test") as on:
        with _batch(on, [one, *invalid, other, one]) as links:
            assert links == [
                (int.from_bytes(context[:16], "big"), int.from_bytes(context[16:], "big"))
                for context in (one, other)
            ]
            assert len(on.current_context()) == 24
            assert on.current_context()[:16] not in {one[:16], other[:16]}
        with _batch(on, invalid) as links:
            assert (links, on.current_context()) == ([], b"")
        with on.start_trace("any"):
            assert on.current_context() == b""


def test_batch_span_with_many_callers_has_at_most_max_links() -> None:
    """A batch may serve a thousand callers."""
    with tracing_context("test") as on:
        contexts: list[object] = [number.to_bytes(16, "big") + b"12345678" for number in range(1, 1001)]
        with _batch(on, contexts) as links:
            assert len(links) == MAX_LINKS


def test_attributes_that_otlp_cannot_encode_are_converted() -> None:
    """An integer over 64 bits is clamped, and a lone surrogate (in a file name) is replaced."""
    from opentelemetry import trace  # noqa: PLC0415 - only where tracing is on, as the code does

    with tracing_context("test") as on, on.start_trace("root", file="a\udcff") as span:
        span.set_attributes(hits=10**30, misses=-(10**30), ok=True)
        attributes = dict(getattr(trace.get_current_span(), "attributes", {}))
    assert attributes == {"file": "a?", "hits": 2**63 - 1, "misses": -(2**63), "ok": True}


def test_exception_in_span_records_type_without_text() -> None:
    """The text of an exception may quote a company or a title."""
    from opentelemetry import trace  # noqa: PLC0415 - only where tracing is on, as the code does

    def fail(on: Tracing) -> None:
        with on.start_trace("root"), on.span("part"):
            spans.append(trace.get_current_span())
            raise ValueError("Acme, Clerk")

    spans: list[trace.Span] = []
    with tracing_context("test") as on, pytest.raises(ValueError, match="Acme"):
        fail(on)
    [span] = spans
    # `to_json` is of the SDK, not of the API.
    text = str(getattr(span, "to_json")())  # noqa: B009 - see above
    assert "ValueError" in text
    assert "Acme" not in text
