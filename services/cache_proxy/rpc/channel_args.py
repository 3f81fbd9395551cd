"""Channel arguments that limit what a connection may do before gRPC's core closes or refuses it.

Every value was tried against a hostile peer (docs/security.md, tests/security/). Core cannot limit the bytes
of messages and responses together. `inbound_limiter.py` does.
"""

import resource

# RPCs in progress on a connection: as many as a batch to the model holds, so that RPCs of one pair each can
# fill a batch.
_MAX_STREAMS = 1024
# Above this, core cancels RPCs at random, also those of other callers. Two connections' worth is 2048.
_MAX_PENDING_RPCS = 4096
# An idle connection takes 20 KiB.
_MAX_CONNECTIONS = 10_000
# File descriptors for Redis, the model and /metrics.
_RESERVED_FILES = 256
# Callers may send a ping every 10 s. Half of that tolerates delays in the network: while core sends nothing,
# it never forgets a ping that came too early, and it closes the connection at the third.
_MIN_PING_INTERVAL_MS = 5_000
_MAX_IDLE_MS = 300_000
_KEEPALIVE_INTERVAL_MS = 60_000
# How long a peer may take to send the preface, to acknowledge settings, or to answer a ping.
_PEER_TIMEOUT_MS = 10_000


def server_args(*, listener_count: int) -> list[tuple[str, int]]:
    """Return the channel arguments of the server. Core counts connections separately for each listener."""
    return [
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server.max_pending_requests", _MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_RPCS),
        ("grpc.max_allowed_incoming_connections", max(1, _max_connections() // max(1, listener_count))),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        # Without it, core accepts one ping in two hours on an idle connection.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_idle_ms", _MAX_IDLE_MS),
        ("grpc.server_handshake_timeout_ms", _PEER_TIMEOUT_MS),
        ("grpc.http2.settings_timeout", _PEER_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _PEER_TIMEOUT_MS),
        # With the keepalive timeout alone, core closes no connection.
        ("grpc.http2.ping_timeout_ms", _PEER_TIMEOUT_MS),
    ]


def _max_connections() -> int:
    """Return how many connections fit the limit of open files, with some left for the proxy itself."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(files // 2, files - _RESERVED_FILES))
