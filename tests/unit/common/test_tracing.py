"""Tracing: what asks for it, what is taken from callers and from Redis, what is sampled."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.common import tracing
from services.common.errors import UsageError
from services.common.tracing import MAX_LINKS, NOOP_SPAN, OFF, Tracing

_TRACE, _SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_SAMPLED = (("traceparent", f"00-{_TRACE}-{_SPAN}-01"),)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the spans go, and nobody waits for them."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.05")


@pytest.mark.parametrize(
    ("variables", "asking"),
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
def test_what_asks_for_traces(variables: dict[str, str], asking: str | None) -> None:
    """An endpoint or the exporter's name turns tracing on; none, and the SDK's own switch, win over them."""
    assert tracing.requested_by(variables) == asking


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier pigeon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
    ],
)
def test_bad_variables_are_usage_errors(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be meant ends a command with exit code 2, and its line has the value in it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=value), tracing.tracing_context("test"):
        pass


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where traces are asked for and OpenTelemetry is not installed: exit code 2 and the pip line."""
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "services.common.otel", raising=False)
    monkeypatch.delattr("services.common.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UsageError) as error, tracing.tracing_context("test"):
        pass
    assert error.value.exit_code == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in str(error.value)
    assert str(error.value).endswith("run: pip install '.[tracing]'")


def test_off_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asks, a block's span notes nothing, and nobody who is called hears of it."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    with (
        tracing.tracing_context("test") as off,
        off.start_trace("a"),
        off.server_span("b", _SAMPLED),
        off.batch_span("c", [b""]) as span,
    ):
        assert off is OFF
        assert span is NOOP_SPAN
        assert (off.current_context(), off.headers(), off.is_enabled) == (b"", (), False)


def test_a_caller_s_trace_goes_on() -> None:
    """What is served is in the caller's trace, its parts too, and whoever is called hears of the last one."""
    with tracing.tracing_context("test") as on, on.server_span("rpc", _SAMPLED):
        served = on.current_context()
        with on.client_span("model"):
            called = on.current_context()
            [(name, value)] = on.headers()
    assert (name, value) == ("traceparent", f"00-{_TRACE}-{called[16:].hex()}-01")
    assert served[:16].hex() == called[:16].hex() == _TRACE
    assert len({served[16:], called[16:], bytes.fromhex(_SPAN)}) == 3


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
def test_a_nonsensical_traceparent_begins_a_trace(traceparent: str) -> None:
    """What is no W3C context is as good as none: a trace of the proxy's own."""
    with tracing.tracing_context("test") as on, on.server_span("rpc", (("traceparent", traceparent),)):
        assert on.current_context()[:16].hex() not in {_TRACE, ""}


def test_only_a_short_state_is_carried() -> None:
    """A caller's `tracestate` goes on to the model, but not eight kilobytes of it with every span."""
    with tracing.tracing_context("test") as on:
        with on.server_span("rpc", (*_SAMPLED, ("tracestate", "a=b"))):
            assert dict(on.headers())["tracestate"] == "a=b"
        long = ",".join(f"{key}={'b' * 200}" for key in "abcd")
        with on.server_span("rpc", (*_SAMPLED, ("tracestate", long))):
            assert "tracestate" not in dict(on.headers())


def test_what_is_not_sampled_costs_little() -> None:
    """Of a caller who is not sampled nothing is recorded or queued; whoever is called learns just that."""
    unsampled = (("traceparent", f"00-{_TRACE}-{_SPAN}-00"),)
    with tracing.tracing_context("test") as on, on.server_span("rpc", unsampled), on.span("part") as part:
        assert part is NOOP_SPAN
        assert on.current_context() == b""
        assert dict(on.headers())["traceparent"].endswith("-00")


@contextmanager
def _batch(on: Tracing, contexts: list[object]) -> Iterator[list[tuple[int, int]]]:
    from opentelemetry import trace  # noqa: PLC0415 - as the code does

    with on.batch_span("batch", contexts):  # type: ignore[arg-type] # whatever Redis gave
        links = getattr(trace.get_current_span(), "links", ())
        yield [(link.context.trace_id, link.context.span_id) for link in links]


def test_a_batch_links_to_those_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of its own that names its callers' spans, each once, sampled if they are, whatever the sampler
    makes of other traces; what is no context is passed over.
    """  # noqa: D205 - one thought
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    one, other = bytes(range(24)), bytes(range(1, 25))
    hostile: list[object] = [b"", b"short", bytes(24), bytes(16) + b"12345678", "text" * 6, None, 7, [one]]
    with tracing.tracing_context("test") as on:
        with _batch(on, [one, *hostile, other, one]) as links:
            assert links == [
                (int.from_bytes(context[:16], "big"), int.from_bytes(context[16:], "big"))
                for context in (one, other)
            ]
            assert len(on.current_context()) == 24
            assert on.current_context()[:16] not in {one[:16], other[:16]}
        with _batch(on, hostile) as links:
            assert (links, on.current_context()) == ([], b"")
        with on.start_trace("any"):
            assert on.current_context() == b""


def test_links_are_bounded() -> None:
    """A batch may serve a thousand callers; its span names as many as fit."""
    with tracing.tracing_context("test") as on:
        contexts: list[object] = [number.to_bytes(16, "big") + b"12345678" for number in range(1, 1001)]
        with _batch(on, contexts) as links:
            assert len(links) == MAX_LINKS


def test_no_attribute_costs_the_other_spans() -> None:
    """A number that OTLP has no room for, or half a character (a file's name), is noted as near as can be."""
    from opentelemetry import trace  # noqa: PLC0415 - as the code does

    with tracing.tracing_context("test") as on, on.start_trace("root", file="a\udcff") as span:
        span.set_attributes(hits=10**30, misses=-(10**30), ok=True)
        noted = dict(getattr(trace.get_current_span(), "attributes", {}))
    assert noted == {"file": "a?", "hits": 2**63 - 1, "misses": -(2**63), "ok": True}


def test_a_failure_tells_no_words() -> None:
    """Of an exception a span has the type: its words may quote a company or a title."""
    from opentelemetry import trace  # noqa: PLC0415 - as the code does

    def fail(on: Tracing) -> None:
        with on.start_trace("root"), on.span("part"):
            seen.append(trace.get_current_span())
            raise ValueError("Acme, Clerk")

    seen: list[trace.Span] = []
    with tracing.tracing_context("test") as on, pytest.raises(ValueError, match="Acme"):
        fail(on)
    [span] = seen
    text = str(getattr(span, "to_json")())  # noqa: B009 - the SDK's, not the API's
    assert "ValueError" in text
    assert "Acme" not in text
