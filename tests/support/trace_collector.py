"""An OpenTelemetry collector process (rotel) and a gRPC server that records the spans it exports."""

import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2

from tests.support.redis_server import free_port, wait_for

AttributeValue = str | int | float | bool


@dataclass(frozen=True)
class ReceivedSpan:
    """A span that the collector exported. Ids are in hex; `parent_id` is empty for a root span."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: frozenset[tuple[str, str]]
    failed: bool
    attributes: dict[str, AttributeValue] = field(hash=False, compare=False)
    text: str = field(hash=False, compare=False)


@dataclass
class TraceCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receive spans from the collector process.

    State: `_spans`, appended to by the server's threads and guarded by `_lock`.
    """

    grpc_port: int = 0
    http_port: int = 0
    _spans: list[ReceivedSpan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def grpc_environment(self) -> dict[str, str]:
        """Return the environment variables by which a process exports its traces here over gRPC."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.grpc_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    @property
    def http_environment(self) -> dict[str, str]:
        """Return the environment variables by which a process exports its traces here over HTTP."""
        return self.grpc_environment | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.http_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }

    def spans(self, name: str | None = None) -> list[ReceivedSpan]:
        """Return the spans received so far, of this name or of all."""
        with self._lock:
            return [span for span in self._spans if name in {None, span.name}]

    def wait_for_spans(self, name: str, *, count: int = 1) -> list[ReceivedSpan]:
        """Wait for at least `count` spans of this name and return them."""

        def find_spans() -> list[ReceivedSpan]:
            spans = self.spans(name)
            return spans if len(spans) >= count else []

        spans: list[ReceivedSpan] = wait_for(
            find_spans, description=f"{count} spans {name!r} at the collector"
        )
        return spans

    def Export(  # noqa: N802 - OTLP's name
        self, request: pb.ExportTraceServiceRequest, _context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        """Record the spans of an export request."""
        received = [
            ReceivedSpan(
                service=str(_attribute_values(resource.resource.attributes).get("service.name")),
                name=span.name,
                kind=span.kind,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                links=frozenset((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                failed=span.status.code == span.status.STATUS_CODE_ERROR,
                attributes=_attribute_values(span.attributes),
                text=str(resource.resource) + str(span),
            )
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += received
        return pb.ExportTraceServiceResponse()


def _attribute_values(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, AttributeValue]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}


@contextmanager
def trace_collector(folder: Path) -> Iterator[TraceCollector]:
    """Run a collector that accepts OTLP over gRPC and over HTTP."""
    collector = TraceCollector(free_port(), free_port())
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
        collector, server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (folder / "collector.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(files("rotel") / "rotel-agent"), "start"),
                *("--otlp-grpc-endpoint", f"127.0.0.1:{collector.grpc_port}"),
                *("--otlp-http-endpoint", f"127.0.0.1:{collector.http_port}"),
                *("--exporter", "otlp", "--otlp-exporter-protocol", "grpc"),
                *("--otlp-exporter-endpoint", f"http://127.0.0.1:{port}", "--batch-timeout", "50ms"),
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        for own_port in (collector.grpc_port, collector.http_port):
            wait_for(partial(_is_listening, own_port), description="the collector listens")
        yield collector
    finally:
        process.kill()
        process.wait()
        server.stop(grace=None).wait()
        pool.shutdown(wait=False, cancel_futures=True)


def _is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
