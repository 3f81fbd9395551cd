"""A caller of the proxy (or of the model): its own channel, and what came back in a form to compare."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import grpc
from google.rpc import error_details_pb2, status_pb2
from prometheus_client.parser import text_string_to_metric_families

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc

Pairs = Sequence[tuple[str, str]]
_MAX_MESSAGE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RpcResult:
    """How an RPC ended; `levels` and `uuids` by position, empty if it failed."""

    code: grpc.StatusCode
    message: str
    trailers: Mapping[str, str | bytes]
    levels: list[int] = field(default_factory=list)
    uuids: list[int] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """Trailer `x-cache-hits`."""
        return int(self.trailers["x-cache-hits"])

    @property
    def misses(self) -> int:
        """Trailer `x-cache-misses`."""
        return int(self.trailers["x-cache-misses"])

    @property
    def pushback_ms(self) -> int | None:
        """Trailer `grpc-retry-pushback-ms`."""
        text = self.trailers.get("grpc-retry-pushback-ms")
        return None if text is None else int(text)

    @property
    def violations(self) -> dict[str, str]:
        """What `google.rpc.BadRequest` names, with the reasons."""
        status = status_pb2.Status()
        details = self.trailers.get("grpc-status-details-bin", b"")
        assert isinstance(details, bytes)
        status.MergeFromString(details)
        found: dict[str, str] = {}
        for detail in status.details:
            bad_request = error_details_pb2.BadRequest()
            assert detail.Unpack(bad_request)
            found |= {violation.field: violation.description for violation in bad_request.field_violations}
        return found


class PendingRpc:
    """An RPC under way."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def result(self) -> RpcResult:
        """Wait for its end."""
        try:
            error = self._call.exception()
        except grpc.FutureCancelledError:
            return RpcResult(grpc.StatusCode.CANCELLED, "by the caller itself", {})
        trailers = dict(self._call.trailing_metadata() or ())
        if error is not None:
            return RpcResult(self._call.code(), self._call.details(), trailers)
        batch = self._call.result().batch
        return RpcResult(
            grpc.StatusCode.OK,
            "",
            trailers,
            [answer.seniority for answer in batch],
            [answer.uuid for answer in batch],
        )

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self._call.done())

    def cancel(self) -> None:
        """Go away, as a caller that lost interest."""
        self._call.cancel()


class Caller:
    """One caller, one connection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._stub = seniority_pb2_grpc.SeniorityModelStub(channel)

    def start_infer(
        self,
        pairs: Pairs,
        *,
        uuids: Sequence[int] | None = None,
        timeout_seconds: float | None = 60,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> PendingRpc:
        """Ask, and do not wait."""
        request = pb.SeniorityRequestBatch(
            batch=[
                pb.SeniorityRequest(uuid=uuid, company=company, title=title)
                for uuid, (company, title) in zip(
                    range(len(pairs)) if uuids is None else uuids, pairs, strict=True
                )
            ]
        )
        return PendingRpc(
            self._stub.InferSeniority.future(request, timeout=timeout_seconds, metadata=tuple(metadata))
        )

    def infer(
        self,
        pairs: Pairs,
        *,
        uuids: Sequence[int] | None = None,
        timeout_seconds: float | None = 60,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> RpcResult:
        """Ask, and wait for the end."""
        return self.start_infer(
            pairs, uuids=uuids, timeout_seconds=timeout_seconds, metadata=metadata
        ).result()


@contextmanager
def open_caller(target: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Caller]:
    """A caller with a connection that it shares with no other; without credentials, in the clear."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
    ]
    opened = (
        grpc.secure_channel(target, credentials, options=options)
        if credentials
        else grpc.insecure_channel(target, options=options)
    )
    with opened as channel:
        yield Caller(channel)


def make_pairs(company: str, count: int) -> list[tuple[str, str]]:
    """So many distinct pairs whose companies begin so."""
    return [(f"{company} {number}", f"Title {number % 7}") for number in range(count)]


def read_metrics(http_url: str) -> dict[tuple[str, ...], float]:
    """What `/metrics` says: by name, then the labels' values in the order of their names."""
    with urlopen(f"{http_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
