"""A collector of traces as a process (rotel), and behind it what it passes on, for a test to look at."""

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
    """A span as it came out of the collector; ids in hex, `parent` empty for a root."""

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
    """State: `_spans`, added to by the server's threads under the lock."""

    grpc_port: int = 0
    http_port: int = 0
    _spans: list[ReceivedSpan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def grpc_environment(self) -> dict[str, str]:
        """The variables that have a process send its traces here."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.grpc_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    @property
    def http_environment(self) -> dict[str, str]:
        """The same by OTLP's other protocol."""
        return self.grpc_environment | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.http_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }

    def spans(self, name: str | None = None) -> list[ReceivedSpan]:
        """Those that came so far."""
        with self._lock:
            return [span for span in self._spans if name in {None, span.name}]

    def wait_for_spans(self, name: str, *, count: int = 1) -> list[ReceivedSpan]:
        """So many spans of this name, or more."""

        def found() -> list[ReceivedSpan]:
            spans = self.spans(name)
            return spans if len(spans) >= count else []

        spans: list[ReceivedSpan] = wait_for(found, description=f"{count} spans {name!r} at the collector")
        return spans

    def Export(  # noqa: N802 - OTLP's name
        self, request: pb.ExportTraceServiceRequest, _context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        """Keep what comes."""
        seen = [
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
            self._spans += seen
        return pb.ExportTraceServiceResponse()


def _attribute_values(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, AttributeValue]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}


@contextmanager
def trace_collector(folder: Path) -> Iterator[TraceCollector]:
    """A collector that takes OTLP by gRPC and HTTP."""
    seen = TraceCollector(free_port(), free_port())
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(seen, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (folder / "collector.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(files("rotel") / "rotel-agent"),
                "start",
                "--otlp-grpc-endpoint",
                f"127.0.0.1:{seen.grpc_port}",
                "--otlp-http-endpoint",
                f"127.0.0.1:{seen.http_port}",
                "--exporter",
                "otlp",
                "--otlp-exporter-protocol",
                "grpc",
                "--otlp-exporter-endpoint",
                f"http://127.0.0.1:{port}",
                "--batch-timeout",
                "50ms",
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        for own in (seen.grpc_port, seen.http_port):
            wait_for(partial(_is_listening, own), description="the collector listens")
        yield seen
    finally:
        process.kill()
        process.wait()
        server.stop(grace=None).wait()
        pool.shutdown(wait=False, cancel_futures=True)


def _is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
