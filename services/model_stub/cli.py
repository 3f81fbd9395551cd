"""The command `model-stub serve`: its flags, and the server."""

import asyncio
import signal
from dataclasses import dataclass
from typing import Any

import click
from grpc import aio
from grpc_reflection.v1alpha import reflection

from protos import seniority_pb2, seniority_pb2_grpc
from services.common import logs, options
from services.common.errors import CommandError
from services.common.grpc_ports import add_ports
from services.common.listening import check_address
from services.common.options import flag
from services.model_stub.call_log import CallLog
from services.model_stub.capacity import Capacity
from services.model_stub.faults import HELP, parse_faults
from services.model_stub.servicer import ModelStub

_MAX_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class StubSettings:
    """Settings of the stub. Times are in seconds, `rate` in requests per second."""

    listen: tuple[str, ...] = flag(
        "--listen", options.LIST, "127.0.0.1:50052", text="address; port 0 picks one"
    )
    rate: float = flag("--rate", options.RATE_OR_ZERO, "1000", text="requests a second; 0: no limit")
    max_batch: int = flag("--max-batch", options.COUNT, "1000", text="requests in a call, at most")
    latency_seconds: float = flag("--latency", options.DURATION, "50ms", text="time to answer a batch")
    fail: tuple[str, ...] = flag("--fail", options.LIST, text=HELP)
    log: str | None = flag("--log", options.TEXT, text="file to which each call is appended, as JSON lines")

    def __post_init__(self) -> None:
        """Reject invalid listen addresses. Raises UsageError."""
        for address in self.listen:
            check_address(address, flag_name="--listen", allow_unix=True)


async def serve(settings: StubSettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    try:
        faults = parse_faults(settings.fail)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        log = CallLog(settings.log)
    except OSError as error:
        message = f"--log {settings.log}: {error.strerror}"
        raise CommandError(message) from error
    server = aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
    )
    servicer = ModelStub(
        capacity=Capacity(rate=settings.rate, max_batch=settings.max_batch),
        latency_seconds=settings.latency_seconds,
        max_batch=settings.max_batch,
        faults=faults,
        log=log,
    )
    seniority_pb2_grpc.add_SeniorityModelServicer_to_server(servicer, server)
    names = (seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    bound = [add_ports(server, address) for address in settings.listen]
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    logs.announce_ready(listen=bound)
    await stop.wait()
    await server.stop(grace=0)
    log.close()


def _run_serve(**values: Any) -> None:
    logs.configure(log_format="text", level="info")
    asyncio.run(serve(options.read_settings(StubSettings, values)))


cli = click.Group("model-stub", help="A stand-in for the seniority model, for demos and tests only.")
cli.add_command(
    options.SettingsCommand(
        "serve",
        params=options.click_options(StubSettings, prefix="MODEL_STUB"),
        callback=_run_serve,
        help="Serve until stopped. Every call can be logged, and so judged.",
    )
)


def main() -> None:
    """Run the command line."""
    options.run_command(cli, program="model-stub")
