"""Tracing between real processes: whole, to a real collector; harmless without one; absent when off."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller, read_metrics
from tests.support.model_server import scripted_model
from tests.support.processes import ServiceProcess, cache_proxy, run_command
from tests.support.redis_server import wait_for
from tests.support.trace_collector import ReceivedSpan, TraceCollector, trace_collector

pytestmark = pytest.mark.slow  # several processes each

_CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_INTERNAL, _SERVER, _CLIENT, _CONSUMER = 1, 2, 3, 5  # OTLP's kinds


@pytest.fixture(scope="module")
def collecting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceCollector]:
    """A collector for these tests."""
    with trace_collector(tmp_path_factory.mktemp("collector")) as running:
        yield running


def _postings(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = [json.dumps({"company": f"Canary {number}", "title": "Chief Canary"}) for number in range(count)]
    (folder / "1.jsonl").write_text("\n".join(lines))
    return folder


def _lines(proxy: ServiceProcess) -> list[dict[str, object]]:
    return [line for line in map(json.loads, proxy.log.splitlines()) if line.get("event") == "rpc"]


def test_one_trace_from_the_file_to_the_batch(
    tmp_path: Path, shared_redis: str, collecting: TraceCollector
) -> None:
    """A file goes through one replica and a caller's pairs through another, and share the model's next call.

    Each trace is whole, down to store and queue; the batch, a trace of its own on whichever replica sent it,
    links to both RPCs; the model is told of the call; both log lines have their ids; and no span has a text.
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
        started = {"env": collecting.grpc_environment}
        with (
            cache_proxy("--model-target", model.target, *flags, **started) as for_files,
            cache_proxy("--model-target", model.target, *flags, **started) as for_callers,
            open_caller(for_callers.target) as asking,
        ):
            asked = asking.start_infer(
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
                env=collecting.http_environment | {"OTEL_SERVICE_NAME": "nightly"},
            )
            assert (ended.returncode, ended.stderr) == (0, "")
            assert len(asked.result().levels) == 10
            [batch] = collecting.wait_for_spans("model.batch")
            [file] = collecting.wait_for_spans("file")
            for proxy in (for_files, for_callers):
                assert proxy.stop() == 0  # so all that it had to tell is told
    spans = collecting.spans()

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
        [line] = _lines(proxy)
        assert (line["trace_id"], line["span_id"], line["pairs"]) == (
            rpc.trace_id,
            rpc.span_id,
            rpc.attributes["pairs"],
        )
    assert not [span for span in spans if span.failed or "Canary" in span.text]


def test_what_went_wrong_is_in_the_trace(collecting: TraceCollector) -> None:
    """A caller's own mistake is no failure of the proxy's, but its status is told; and none of its words."""
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
            env=collecting.grpc_environment,
        ) as proxy,
        open_caller(proxy.target) as asking,
    ):
        asking.start_infer([("Canary & Co" * 9, "Chief")], metadata=[("traceparent", traceparent)]).result()
        assert proxy.stop() == 0
    wait_for(
        lambda: any(span.trace_id.endswith("1234") for span in collecting.spans()),
        description="the RPC's span",
    )
    [rpc] = [span for span in collecting.spans() if span.trace_id.endswith("1234")]
    assert (rpc.attributes["code"], rpc.attributes["failed"], rpc.failed) == ("INVALID_ARGUMENT", 1, False)
    assert "Canary" not in rpc.text


def test_a_dead_collector_costs_nothing() -> None:
    """RPCs are answered as ever, one line says that traces are dropped, and the end waits for nobody."""
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
        open_caller(proxy.target) as asking,
    ):
        assert asking.start_infer([("c", "t")]).result().levels
        wait_for(lambda: "traces" in proxy.log, description="it is said that traces are dropped")
        for number in range(50):
            assert asking.start_infer([(f"c{number}", "t")]).result().levels
        began = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - began < 20
    lines = [json.loads(line) for line in proxy.log.splitlines()]
    about = [line["message"] for line in lines if "collector" in line["message"]]
    assert len(about) == 1
    assert about[0].startswith("the collector does not take traces, they are dropped")
    assert {line["logger"].split(".")[0] for line in lines} == {"services"}


@pytest.fixture
def poison(tmp_path: Path) -> dict[str, str]:
    """An environment where OpenTelemetry is not installed."""
    package = tmp_path / "poison" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ModuleNotFoundError('No module named opentelemetry', name='opentelemetry')\n"
    )
    root = Path(__file__).parents[3]
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), str(root)])}


def test_off_needs_no_opentelemetry(tmp_path: Path, poison: dict[str, str]) -> None:
    """Without its variables both services work where it is not installed, so they never import it; with
    them, a command ends with exit code 2 and the pip line.
    """  # noqa: D205 - one thought
    source, out = _postings(tmp_path / "in", 3), str(tmp_path / "out")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS, env=poison
        ) as proxy,
    ):
        augment = ("services.augmenter", "run", str(source), out, "--target", proxy.target)
        assert run_command(*augment, env=poison).returncode == 0
        assert not any(name == "traceparent" for name in model.calls[0].metadata)
        ended = run_command(*augment, env=poison | {"OTEL_TRACES_EXPORTER": "otlp"})
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
        assert "pip install '.[tracing]'" in ended.stderr
