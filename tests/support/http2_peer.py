"""A peer that speaks HTTP/2 frame by frame, as badly as a test wants."""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from protos import seniority_pb2 as pb

INFER_PATH = "/SeniorityModel/InferSeniority"
Headers = Sequence[tuple[str, str | bytes]]


def frame_grpc_message(message: bytes) -> bytes:
    """A message with gRPC's own five bytes in front."""
    return struct.pack(">BI", 0, len(message)) + message


def encode_request(company: str, count: int, *, uuid: int = 1) -> bytes:
    """A request for so many pairs of one company."""
    items = [pb.SeniorityRequest(uuid=uuid, company=company, title=str(number)) for number in range(count)]
    return pb.SeniorityRequestBatch(batch=items).SerializeToString()


class Http2Peer:
    """One connection. What h2 would refuse to send, a test sends by `raw`."""

    def __init__(self, target: str, *, window: int = 65_535, receive_buffer: int | None = None) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, validate_outbound_headers=False, validate_inbound_headers=False
            )
        )
        self.h2.initiate_connection()
        if window != 65_535:
            self.h2.update_settings({0x4: window})  # SETTINGS_INITIAL_WINDOW_SIZE
        self.events: list[h2.events.Event] = []
        self.flush()

    def flush(self) -> None:
        """Send what h2 has made."""
        data = self.h2.data_to_send()
        if data:
            self.socket.sendall(data)

    def send_headers(self, extra: Headers = (), *, path: str | bytes = INFER_PATH, end: bool = False) -> int:
        """Begin an RPC; the stream's number."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(
            stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "proxy"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *extra,
            ],
            end_stream=end,
        )
        return stream

    def send_data(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send data as far as the other side's windows let it, and wait for them to open."""
        at = 0
        while at < len(data):
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.flush()
                self.receive()
                continue
            part = data[at : at + room]
            at += len(part)
            self.h2.send_data(stream, part, end_stream=end and at == len(data))
        self.flush()

    def send_request(self, message: bytes, extra: Headers = ()) -> int:
        """A whole RPC, its answer not waited for."""
        stream = self.send_headers(extra)
        self.send_data(stream, frame_grpc_message(message))
        return stream

    def receive(self, timeout_seconds: float = 30) -> list[h2.events.Event]:
        """What comes next; empty: nothing within the time. Raises ConnectionError once it is closed."""
        self.socket.settimeout(timeout_seconds)
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return []
        if not data:
            raise ConnectionResetError("closed")
        found = self.h2.receive_data(data)
        self.flush()
        self.events.extend(found)
        return found

    def close(self) -> None:
        """Go away without a word."""
        self.socket.close()


@contextmanager
def open_peer(target: str, *, window: int = 65_535, receive_buffer: int | None = None) -> Iterator[Http2Peer]:
    """A connection for as long as the block lasts."""
    made = Http2Peer(target, window=window, receive_buffer=receive_buffer)
    try:
        yield made
    finally:
        made.close()


def grpc_statuses(http2_peer: Http2Peer) -> dict[int, int]:
    """The gRPC status of each stream that has ended with one."""
    found = {}
    for event in http2_peer.events:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            for name, value in event.headers or ():
                if name == b"grpc-status":
                    found[event.stream_id or 0] = int(value)
    return found
