"""A client that sends HTTP/2 frame by frame, including what a well-behaved client never sends."""

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

_DEFAULT_WINDOW_BYTES = 65_535
_SETTINGS_INITIAL_WINDOW_SIZE = 0x4


def frame_grpc_message(message: bytes) -> bytes:
    """Return a message behind the five bytes of gRPC's length prefix."""
    return struct.pack(">BI", 0, len(message)) + message


def encode_request(company: str, count: int, *, uuid: int = 1) -> bytes:
    """Return a serialized request with `count` distinct pairs of one company."""
    items = [pb.SeniorityRequest(uuid=uuid, company=company, title=str(number)) for number in range(count)]
    return pb.SeniorityRequestBatch(batch=items).SerializeToString()


class Http2Peer:
    """One connection. Tests send what h2 refuses to send through `socket`."""

    def __init__(
        self, target: str, *, window: int = _DEFAULT_WINDOW_BYTES, receive_buffer: int | None = None
    ) -> None:
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
        if window != _DEFAULT_WINDOW_BYTES:
            self.h2.update_settings({_SETTINGS_INITIAL_WINDOW_SIZE: window})
        self.events: list[h2.events.Event] = []
        self.flush()

    def flush(self) -> None:
        """Send the frames that h2 has prepared."""
        data = self.h2.data_to_send()
        if data:
            self.socket.sendall(data)

    def send_headers(self, extra: Headers = (), *, path: str | bytes = INFER_PATH, end: bool = False) -> int:
        """Start an RPC and return the number of its stream."""
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
        """Send data within the server's flow-control windows, waiting for them to open."""
        position = 0
        while position < len(data):
            window = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if window <= 0:
                self.flush()
                self.receive()
                continue
            part = data[position : position + window]
            position += len(part)
            self.h2.send_data(stream, part, end_stream=end and position == len(data))
        self.flush()

    def send_request(self, message: bytes, extra: Headers = ()) -> int:
        """Send a complete request without waiting for its response; return the number of its stream."""
        stream = self.send_headers(extra)
        self.send_data(stream, frame_grpc_message(message))
        return stream

    def receive(self, timeout_seconds: float = 30) -> list[h2.events.Event]:
        """Return the next events, or an empty list after the timeout.

        Raise `ConnectionError` when the server has closed the connection.
        """
        self.socket.settimeout(timeout_seconds)
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return []
        if not data:
            raise ConnectionResetError("closed")
        events = self.h2.receive_data(data)
        self.flush()
        self.events.extend(events)
        return events

    def close(self) -> None:
        """Close the socket without sending GOAWAY."""
        self.socket.close()


@contextmanager
def open_peer(
    target: str, *, window: int = _DEFAULT_WINDOW_BYTES, receive_buffer: int | None = None
) -> Iterator[Http2Peer]:
    """Open a connection and close it at the end of the block."""
    opened = Http2Peer(target, window=window, receive_buffer=receive_buffer)
    try:
        yield opened
    finally:
        opened.close()


def grpc_statuses(http2_peer: Http2Peer) -> dict[int, int]:
    """Return the gRPC status of each stream that has ended with one."""
    statuses = {}
    for event in http2_peer.events:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            for name, value in event.headers or ():
                if name == b"grpc-status":
                    statuses[event.stream_id or 0] = int(value)
    return statuses
