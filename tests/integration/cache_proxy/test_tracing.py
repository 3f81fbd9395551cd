"""Tracing between processes: complete traces with a collector, no harm without one, nothing when off."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller, read_metrics
from tests.support.model_server import scripted_model
from tests.support.processes import ROOT, ServiceProcess, cache_proxy, run_command
from tests.support.redis_server import wait_for
from tests.support.trace_collector import ReceivedSpan, TraceCollector, trace_collector

pytestmark = pytest.mark.slow

_CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# The kinds of spans in OTLP.
_INTERNAL = 1
_SERVER = 2
_CLIENT = 3
_CONSUMER = 5


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceCollector]:
    """Run a collector for all tests of the module."""
    with trace_collector(tmp_path_factory.mktemp("collector")) as started:
        yield started


def _postings(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = [json.dumps({"company": f"Canary {number}", "title": "Chief Canary"}) for number in range(count)]
    (folder / "1.jsonl").write_text("\n".join(lines))
    return folder


def _rpc_log_lines(proxy: ServiceProcess) -> list[dict[str, object]]:
    return [line for line in map(json.loads, proxy.log.splitlines()) if line.get("event") == "rpc"]


def test_trace_reaches_from_the_file_to_the_batch(
    tmp_path: Path, shared_redis: str, collector: TraceCollector
) -> None:
    """The pairs of a file at one replica and of a caller at another share a call to the model.

    Each trace is complete, with spans for store and queue. The batch is a separate trace of the replica that
    sent it and links to both RPCs. The model gets the trace context, both log lines have their ids, and no
    span contains text of a pair.
    """
    flags = [
        "--cache-url",
        shared_redis,
        "--key-prefix",
        "traced",
        *UNLIMITED_RATE_FLAGS,
        "--linger",
        "60s",
        "--model-batch-size",
        "60",
        "--log-level",
        "debug",
    ]
    with scripted_model() as model:
        started = {"env": collector.grpc_environment}
        with (
            cache_proxy("--model-target", model.target, *flags, **started) as for_files,
            cache_proxy("--model-target", model.target, *flags, **started) as for_callers,
            open_caller(for_callers.target) as caller,
        ):
            rpc_of_caller = caller.start_infer(
                [(f"Canary Other {number}", "Chief Canary") for number in range(10)],
                metadata=[("x-caller", "pricing"), ("traceparent", _CALLER)],
            )
            waiting = ("cache_proxy_queue_pairs", "interactive")
            wait_for(
                lambda: read_metrics(for_callers.http_url).get(waiting) == 10,
                description="the caller's pairs wait",
            )
            source = _postings(tmp_path / "in", 50)
            ended = run_command(
                "services.augmenter",
                "run",
                str(source),
                str(tmp_path / "out"),
                "--target",
                for_files.target,
                env=collector.http_environment | {"OTEL_SERVICE_NAME": "nightly"},
            )
            assert (ended.returncode, ended.stderr) == (0, "")
            assert len(rpc_of_caller.result().levels) == 10
            [batch] = collector.wait_for_spans("model.batch")
            [file] = collector.wait_for_spans("file")
            for proxy in (for_files, for_callers):
                # At its end a process exports its last spans.
                assert proxy.stop() == 0
    spans = collector.spans()

    def one(name: str, kind: int, parent: str) -> ReceivedSpan:
        [span] = [span for span in spans if (span.name, span.kind, span.parent_id) == (name, kind, parent)]
        return span

    [run] = [span for span in spans if span.name == "augmenter.run"]
    assert (file.service, file.parent_id, set(file.links)) == ("nightly", "", {(run.trace_id, run.span_id)})
    window = one("window", _INTERNAL, file.span_id)
    sent = one("InferSeniority", _CLIENT, window.span_id)
    filed = one("InferSeniority", _SERVER, sent.span_id)
    called = one("InferSeniority", _SERVER, _CALLER.split("-")[2])
    for rpc, count, name in ((filed, 50, "augmenter"), (called, 10, "pricing")):
        found = one("store.look_up", _INTERNAL, rpc.span_id)
        waited = one("queue.wait", _INTERNAL, rpc.span_id)
        assert {rpc.trace_id, found.trace_id, waited.trace_id} == {rpc.trace_id}
        assert (found.attributes["found"], waited.attributes["queued"]) == (0, count)
        assert {key: rpc.attributes[key] for key in ("caller", "pairs", "hits", "misses", "code")} == {
            "caller": name,
            "pairs": count,
            "hits": 0,
            "misses": count,
            "code": "OK",
        }
    assert (filed.trace_id, called.trace_id) == (file.trace_id, _CALLER.split("-")[1])
    assert (batch.kind, batch.parent_id) == (_CONSUMER, "")
    assert set(batch.links) == {(filed.trace_id, filed.span_id), (called.trace_id, called.span_id)}
    assert (batch.attributes["pairs"], batch.attributes["outcome"]) == (60, "answered")
    inferred = one("InferSeniority", _CLIENT, batch.span_id)
    [call] = model.calls
    assert str(call.metadata["traceparent"]).startswith(f"00-{batch.trace_id}-{inferred.span_id}-")
    for proxy, rpc in ((for_files, filed), (for_callers, called)):
        [line] = _rpc_log_lines(proxy)
        assert (line["trace_id"], line["span_id"], line["pairs"]) == (
            rpc.trace_id,
            rpc.span_id,
            rpc.attributes["pairs"],
        )
    assert not [span for span in spans if span.failed or "Canary" in span.text]


def test_error_status_is_in_the_trace(collector: TraceCollector) -> None:
    """An invalid request is no failure of the span, but its status is recorded, and no text of the pair."""
    traceparent = "00-00000000000000000000000000001234-b7ad6b7169203331-01"
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            "--max-field-bytes",
            "20",
            env=collector.grpc_environment,
        ) as proxy,
        open_caller(proxy.target) as caller,
    ):
        caller.infer([("Canary & Co" * 9, "Chief")], metadata=[("traceparent", traceparent)])
        assert proxy.stop() == 0
    wait_for(
        lambda: any(span.trace_id.endswith("1234") for span in collector.spans()),
        description="the RPC's span",
    )
    [rpc] = [span for span in collector.spans() if span.trace_id.endswith("1234")]
    assert (rpc.attributes["code"], rpc.attributes["failed"], rpc.failed) == ("INVALID_ARGUMENT", 1, False)
    assert "Canary" not in rpc.text


def test_unreachable_collector_delays_nothing() -> None:
    """RPCs are answered, one log line reports dropped traces, and the process ends without delay."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.1",
        "OTEL_BSP_SCHEDULE_DELAY": "20",
    }
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS, env=env
        ) as proxy,
        open_caller(proxy.target) as caller,
    ):
        assert caller.infer([("c", "t")]).levels
        wait_for(lambda: "traces" in proxy.log, description="dropped traces are logged")
        for number in range(50):
            assert caller.infer([(f"c{number}", "t")]).levels
        stopped_at = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - stopped_at < 20
    lines = [json.loads(line) for line in proxy.log.splitlines()]
    messages = [line["message"] for line in lines if "collector" in line["message"]]
    assert len(messages) == 1
    assert messages[0].startswith("the collector does not take traces, they are dropped")
    assert {line["logger"].split(".")[0] for line in lines} == {"services"}


@pytest.fixture
def without_opentelemetry(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process in which OpenTelemetry cannot be imported."""
    package = tmp_path / "poison" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ModuleNotFoundError('No module named opentelemetry', name='opentelemetry')\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}


def test_services_without_tracing_never_import_opentelemetry(
    tmp_path: Path, without_opentelemetry: dict[str, str]
) -> None:
    """Both services work where it is not installed, unless variables turn tracing on.

    Then a command ends with exit code 2 and the pip command that installs it.
    """
    source = _postings(tmp_path / "in", 3)
    out = str(tmp_path / "out")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            env=without_opentelemetry,
        ) as proxy,
    ):
        augment = ("services.augmenter", "run", str(source), out, "--target", proxy.target)
        assert run_command(*augment, env=without_opentelemetry).returncode == 0
        assert not any(name == "traceparent" for name in model.calls[0].metadata)
        ended = run_command(*augment, env=without_opentelemetry | {"OTEL_TRACES_EXPORTER": "otlp"})
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
        assert "pip install '.[tracing]'" in ended.stderr
