"""A wire between a replica and Redis that can be cut and can lose replies: faults only at the wire."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK = 2**16


class Wire:
    """State: `lose_share` and `_whole`, set by the test's thread and read by the wire's own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = threading.Event()
        self._whole.set()
        self._dice = random.Random(1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: list[tuple[asyncio.Event, asyncio.Event]] = []  # subscribed, deaf
        self.lose_share = 0.0
        self.lost = 0
        self.url = ""

    def cut(self) -> None:
        """What is sent from now on arrives nowhere, and nobody hears of it."""
        self._whole.clear()

    def deafen(self) -> None:
        """Subscriptions made until now hear nothing any more, as behind a router that forgot them."""
        for subscribed, deaf in self._connections:
            if subscribed.is_set():
                deaf.set()

    def lead_to(self, port: int) -> None:
        """New connections go to another server; the others stay with theirs."""
        self._port = port

    def mend(self) -> None:
        """It leads somewhere again."""
        self._whole.set()

    async def serve(self, started: threading.Event, over: asyncio.Event) -> None:
        """Until `over`."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        started.set()
        await over.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        await asyncio.sleep(0)  # what was aborted closes in the next turn

    async def _connected(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            near_out.close()
            return
        ran_script, subscribed, deaf = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._connections.append((subscribed, deaf))
        ways = [
            asyncio.create_task(self._there(near, far_out, ran_script, subscribed)),
            asyncio.create_task(self._back(far, near_out, ran_script, deaf)),
        ]
        self._writers |= {near_out, far_out}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for writer in (near_out, far_out):
            writer.transport.abort()
        self._writers -= {near_out, far_out}

    async def _there(
        self, near: asyncio.StreamReader, far: asyncio.StreamWriter, ran_script: asyncio.Event,
        subscribed: asyncio.Event,
    ) -> None:  # fmt: skip
        while data := await near.read(_CHUNK):
            if b"SUBSCRIBE" in data:
                subscribed.set()
            if b"EVALSHA" in data:
                ran_script.set()
            if self._whole.is_set():
                far.write(data)
                await far.drain()

    async def _back(
        self, far: asyncio.StreamReader, near: asyncio.StreamWriter, ran_script: asyncio.Event,
        deaf: asyncio.Event,
    ) -> None:  # fmt: skip
        while data := await far.read(_CHUNK):
            if ran_script.is_set() and self._dice.random() < self.lose_share:
                self.lost += 1
                return  # it ran, and nobody hears so: the connection breaks
            ran_script.clear()
            if self._whole.is_set() and not deaf.is_set():
                near.write(data)
                await near.drain()


@contextmanager
def wire_to(port: int) -> Iterator[Wire]:
    """A wire to the server on this port, in a thread of its own, for as long as the block lasts."""
    wire, started = Wire(port), threading.Event()
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
