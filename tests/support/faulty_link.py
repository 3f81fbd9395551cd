"""A wire between a replica and Redis that can be cut and can lose replies: faults only at the wire."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK = 2**16


class FaultyLink:
    """State: `lose_share` and `_whole`, set by the test's thread and read by the wire's own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._forwarding = threading.Event()
        self._forwarding.set()
        self._rng = random.Random(1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: list[tuple[asyncio.Event, asyncio.Event]] = []  # subscribed, deaf
        self.reply_loss_ratio = 0.0
        self.lost_replies = 0
        self.url = ""

    def drop_traffic(self) -> None:
        """What is sent from now on arrives nowhere, and nobody hears of it."""
        self._forwarding.clear()

    def mute_subscriptions(self) -> None:
        """Subscriptions made until now hear nothing any more, as behind a router that forgot them."""
        for subscribed, deaf in self._connections:
            if subscribed.is_set():
                deaf.set()

    def redirect(self, port: int) -> None:
        """New connections go to another server; the others stay with theirs."""
        self._port = port

    def restore(self) -> None:
        """It leads somewhere again."""
        self._forwarding.set()

    async def serve(self, started: threading.Event, over: asyncio.Event) -> None:
        """Until `over`."""
        server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        started.set()
        await over.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        await asyncio.sleep(0)  # what was aborted closes in the next turn

    async def _on_connection(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            near_out.close()
            return
        ran_script, subscribed, deaf = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._connections.append((subscribed, deaf))
        ways = [
            asyncio.create_task(self._forward_requests(near, far_out, ran_script, subscribed)),
            asyncio.create_task(self._forward_replies(far, near_out, ran_script, deaf)),
        ]
        self._writers |= {near_out, far_out}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for writer in (near_out, far_out):
            writer.transport.abort()
        self._writers -= {near_out, far_out}

    async def _forward_requests(
        self,
        near: asyncio.StreamReader,
        far: asyncio.StreamWriter,
        ran_script: asyncio.Event,
        subscribed: asyncio.Event,
    ) -> None:
        while data := await near.read(_CHUNK):
            if b"SUBSCRIBE" in data:
                subscribed.set()
            if b"EVALSHA" in data:
                ran_script.set()
            if self._forwarding.is_set():
                far.write(data)
                await far.drain()

    async def _forward_replies(
        self,
        far: asyncio.StreamReader,
        near: asyncio.StreamWriter,
        ran_script: asyncio.Event,
        deaf: asyncio.Event,
    ) -> None:
        while data := await far.read(_CHUNK):
            if ran_script.is_set() and self._rng.random() < self.reply_loss_ratio:
                self.lost_replies += 1
                return  # it ran, and nobody hears so: the connection breaks
            ran_script.clear()
            if self._forwarding.is_set() and not deaf.is_set():
                near.write(data)
                await near.drain()


@contextmanager
def faulty_link(port: int) -> Iterator[FaultyLink]:
    """A wire to the server on this port, in a thread of its own, for as long as the block lasts."""
    wire, started = FaultyLink(port), threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(wire.serve(started, over))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(10)
    try:
        yield wire
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
