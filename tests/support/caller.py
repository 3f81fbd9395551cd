"""A synchronous gRPC caller of the proxy or of the model."""

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
    """The outcome of an RPC. `levels` and `uuids` are in the order of the response; empty if it failed."""

    code: grpc.StatusCode
    message: str
    trailers: Mapping[str, str | bytes]
    levels: list[int] = field(default_factory=list)
    uuids: list[int] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """Return the trailer `x-cache-hits`."""
        return int(self.trailers["x-cache-hits"])

    @property
    def misses(self) -> int:
        """Return the trailer `x-cache-misses`."""
        return int(self.trailers["x-cache-misses"])

    @property
    def pushback_ms(self) -> int | None:
        """Return the trailer `grpc-retry-pushback-ms`, or None if it is absent."""
        text = self.trailers.get("grpc-retry-pushback-ms")
        return None if text is None else int(text)

    @property
    def violations(self) -> dict[str, str]:
        """Return the field violations of `google.rpc.BadRequest`: the description of each field."""
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
    """An RPC that was started."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def result(self) -> RpcResult:
        """Wait for the RPC to end and return its outcome."""
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
        """Return whether the RPC has ended."""
        return bool(self._call.done())

    def cancel(self) -> None:
        """Cancel the RPC, as a caller does that lost interest."""
        self._call.cancel()


class Caller:
    """A caller on one channel."""

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
        """Start an RPC without waiting for its response.

        The ids of the pairs default to 0, 1, 2, and so on.
        """
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
        """Run an RPC and return its outcome."""
        return self.start_infer(
            pairs, uuids=uuids, timeout_seconds=timeout_seconds, metadata=metadata
        ).result()


@contextmanager
def open_caller(target: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Caller]:
    """Open a caller whose connection is shared with no other; without credentials it uses no TLS."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
    ]
    channel = (
        grpc.secure_channel(target, credentials, options=options)
        if credentials
        else grpc.insecure_channel(target, options=options)
    )
    with channel:
        yield Caller(channel)


def make_pairs(company: str, count: int) -> list[tuple[str, str]]:
    """Return `count` distinct pairs; `company` is the prefix of their companies."""
    return [(f"{company} {number}", f"Title {number % 7}") for number in range(count)]


def read_metrics(http_url: str) -> dict[tuple[str, ...], float]:
    """Read `/metrics`.

    The key of a sample is its name, followed by the values of its labels in the order of their names.
    """
    with urlopen(f"{http_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
