"""The load: RPCs one after the other on a few tasks, from bytes to bytes, for so many seconds."""

import asyncio
import itertools
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from grpc import aio

from protos import seniority_pb2 as pb

_METHOD = "/SeniorityModel/InferSeniority"
_TICKS_A_SECOND = 100  # of /proc's clock, on every Linux
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRun:
    """What one run did, and the processor time that it cost the server."""

    rpcs: int
    seconds: float
    server_cpu_seconds: float

    @property
    def rate(self) -> float:
        """RPCs a second."""
        return self.rpcs / self.seconds

    @property
    def server_busy(self) -> float:
        """The part of one core that the server used: well below 1, and it is the load that was measured."""
        return self.server_cpu_seconds / self.seconds

    @property
    def server_us(self) -> float:
        """Processor time an RPC, in microseconds."""
        return self.server_cpu_seconds / self.rpcs * 1e6


def message(pairs: Iterable[tuple[str, str]]) -> bytes:
    """A request for these, with uuids from 0."""
    return pb.SeniorityRequestBatch(
        batch=[
            pb.SeniorityRequest(uuid=uuid, company=company, title=title)
            for uuid, (company, title) in enumerate(pairs)
        ]
    ).SerializeToString()


def send_all(target: str, messages: Iterable[bytes], *, tasks: int) -> None:
    """Send each message once."""
    _run(_send(target, iter(messages), tasks=tasks))


def measure(target: str, messages: Sequence[bytes], *, pid: int, tasks: int, seconds: float) -> LoadRun:
    """Send the messages over and over."""
    before, started_at = cpu_seconds(pid), time.perf_counter()
    ends_at = started_at + seconds
    endless = itertools.takewhile(lambda _: time.perf_counter() < ends_at, itertools.cycle(messages))
    rpcs = _run(_send(target, endless, tasks=tasks))
    took = time.perf_counter() - started_at
    return LoadRun(rpcs=rpcs, seconds=took, server_cpu_seconds=cpu_seconds(pid) - before)


def _run(asking: Coroutine[None, None, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asking)


async def _send(target: str, messages: Iterable[bytes], *, tasks: int) -> int:
    async with aio.insecure_channel(target, options=_OPTIONS) as channel:
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)

        async def work() -> int:
            count = 0
            for one in messages:
                await call(one)
                count += 1
            return count

        return sum(await asyncio.gather(*(work() for _ in range(tasks))))


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
