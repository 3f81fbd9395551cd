"""Generate load: a few tasks send serialized requests one after the other for a number of seconds."""

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
# The unit of processor times in /proc, on every Linux.
_TICKS_PER_SECOND = 100
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRun:
    """The RPCs of one run, and the processor time that the server used for them."""

    rpcs: int
    seconds: float
    server_cpu_seconds: float

    @property
    def rate(self) -> float:
        """Return RPCs per second."""
        return self.rpcs / self.seconds

    @property
    def server_busy(self) -> float:
        """Return the share of one core that the server used. Well below 1, the client was the bottleneck."""
        return self.server_cpu_seconds / self.seconds

    @property
    def server_us(self) -> float:
        """Return the server's processor time per RPC in microseconds."""
        return self.server_cpu_seconds / self.rpcs * 1e6


def message(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Return a serialized request for the pairs, with uuids from 0."""
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
    """Send the messages again and again for `seconds` and measure the server process `pid`."""
    before, started_at = cpu_seconds(pid), time.perf_counter()
    ends_at = started_at + seconds
    endless = itertools.takewhile(lambda _: time.perf_counter() < ends_at, itertools.cycle(messages))
    rpcs = _run(_send(target, endless, tasks=tasks))
    took = time.perf_counter() - started_at
    return LoadRun(rpcs=rpcs, seconds=took, server_cpu_seconds=cpu_seconds(pid) - before)


def _run(requests: Coroutine[None, None, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(requests)


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
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
