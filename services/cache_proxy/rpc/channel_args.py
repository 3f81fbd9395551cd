"""What a connection may do before gRPC's core closes or refuses it.

Every figure was tried against a hostile peer (docs/security.md, tests/security/). What core cannot bound, the
bytes of messages and answers together, `intake.py` does.
"""

import resource

_MAX_STREAMS = (
    1024  # RPCs under way: as many as a batch to the model holds, so that it may be full of lone pairs
)
_MAX_PENDING_RPCS = (
    4096  # beyond it core cancels RPCs by lot, whose ever they are; two connections' worth is 2048
)
_MAX_CONNECTIONS = 10_000  # of 20 KiB each while they idle
_RESERVED_FILES = 256  # to Redis, the model, and for /metrics
# Callers may send a ping every 10 s. Half of that leaves room for delays on the way: core never forgets a
# strike while it sends nothing, and closes the connection at the third.
_MIN_PING_INTERVAL_MS = 5_000
_MAX_IDLE_MS = 300_000
_KEEPALIVE_INTERVAL_MS = 60_000
_PEER_TIMEOUT_MS = 10_000  # to say hello, to acknowledge settings, to answer a ping


def server_args(*, listener_count: int) -> list[tuple[str, int]]:
    """Channel arguments of the server. Core counts connections by listener."""
    return [
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server.max_pending_requests", _MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_RPCS),
        ("grpc.max_allowed_incoming_connections", max(1, _max_connections() // max(1, listener_count))),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),  # else core takes one ping in two hours while it is idle
        ("grpc.max_connection_idle_ms", _MAX_IDLE_MS),
        ("grpc.server_handshake_timeout_ms", _PEER_TIMEOUT_MS),
        ("grpc.http2.settings_timeout", _PEER_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _PEER_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _PEER_TIMEOUT_MS),  # with keepalive's own alone, nothing is closed
    ]


def _max_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(files // 2, files - _RESERVED_FILES))
