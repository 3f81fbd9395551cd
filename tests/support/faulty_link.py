"""A TCP link between a replica and Redis that drops traffic and loses replies. It runs in its own thread."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 2**16


class FaultyLink:
    """A link to the server on one port.

    State: `reply_loss_ratio`, `_forwarding` and `_port`, set by the test's thread and read by the link's;
    `_connections`, for each connection two events: it has subscribed, and its subscription is muted.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._forwarding = threading.Event()
        self._forwarding.set()
        self._rng = random.Random(1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: list[tuple[asyncio.Event, asyncio.Event]] = []
        self.reply_loss_ratio = 0.0
        self.lost_replies = 0
        self.url = ""

    def drop_traffic(self) -> None:
        """Drop all data from now on, without an error at either end."""
        self._forwarding.clear()

    def mute_subscriptions(self) -> None:
        """Drop all messages to present subscriptions, as a router does that lost its connection table."""
        for subscribed, muted in self._connections:
            if subscribed.is_set():
                muted.set()

    def redirect(self, port: int) -> None:
        """Send new connections to another server. Present connections stay with theirs."""
        self._port = port

    def restore(self) -> None:
        """Forward data again."""
        self._forwarding.set()

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        started.set()
        await stop.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        # Aborted transports close in the next iteration of the event loop.
        await asyncio.sleep(0)

    async def _on_connection(
        self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter
    ) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            client_writer.close()
            return
        ran_script, subscribed, muted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._connections.append((subscribed, muted))
        directions = [
            asyncio.create_task(self._forward_requests(client_reader, server_writer, ran_script, subscribed)),
            asyncio.create_task(self._forward_replies(server_reader, client_writer, ran_script, muted)),
        ]
        self._writers |= {client_writer, server_writer}
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        for writer in (client_writer, server_writer):
            writer.transport.abort()
        self._writers -= {client_writer, server_writer}

    async def _forward_requests(
        self,
        client: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        ran_script: asyncio.Event,
        subscribed: asyncio.Event,
    ) -> None:
        while data := await client.read(_CHUNK_BYTES):
            if b"SUBSCRIBE" in data:
                subscribed.set()
            if b"EVALSHA" in data:
                ran_script.set()
            if self._forwarding.is_set():
                server.write(data)
                await server.drain()

    async def _forward_replies(
        self,
        server: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        ran_script: asyncio.Event,
        muted: asyncio.Event,
    ) -> None:
        while data := await server.read(_CHUNK_BYTES):
            # A lost reply: the script ran, and the connection breaks before its reply arrives.
            if ran_script.is_set() and self._rng.random() < self.reply_loss_ratio:
                self.lost_replies += 1
                return
            ran_script.clear()
            if self._forwarding.is_set() and not muted.is_set():
                client.write(data)
                await client.drain()


@contextmanager
def faulty_link(port: int) -> Iterator[FaultyLink]:
    """Run a link to the server on this port in its own thread."""
    link = FaultyLink(port)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(link.serve(started, stop))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(10)
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
