"""Settings of the server: addresses, limits on requests and on the queue, draining and logs."""

from dataclasses import dataclass

from services.common import options
from services.common.errors import UsageError
from services.common.listening import check_address
from services.common.options import flag


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Where the proxy listens, what it accepts, and how it shuts down."""

    listen: tuple[str, ...] = flag(
        "--listen",
        options.LIST,
        "0.0.0.0:50051",
        text="address for callers; repeatable; unix:/path too; port 0 picks one; 0.0.0.0, [::] and no host "
        "mean every address, IPv4 and IPv6",
    )
    listen_plaintext: tuple[str, ...] = flag(
        "--listen-plaintext",
        options.LIST,
        text="as --listen, and without TLS whatever --tls-cert says: for probes and callers on this machine, "
        "which then need no certificate",
    )
    listen_mode: int | None = flag(
        "--listen-mode", options.MODE, text="octal mode of Unix sockets, as in 0660; by the umask if not set"
    )
    http_listen: str = flag(
        "--http-listen", options.TEXT, "0.0.0.0:9464", text="address for /metrics, /healthz and /readyz"
    )
    l1_max_bytes: int = flag("--l1-max-bytes", options.SIZE, "256MiB", text="in-process cache; 0: none")
    max_request_pairs: int = flag(
        "--max-request-pairs", options.COUNT, "100000", text="pairs in one RPC, at most"
    )
    max_request_bytes: int = flag(
        "--max-request-bytes", options.SIZE, "64MiB", text="bytes in one RPC, at most"
    )
    max_field_bytes: int = flag(
        "--max-field-bytes", options.SIZE, "4096", text="UTF-8 bytes in a company or a title, at most"
    )
    max_queued_pairs: int = flag(
        "--max-queued-pairs", options.COUNT, "1000000", text="pairs waiting for the model, at most"
    )
    max_queued_bytes: int = flag(
        "--max-queued-bytes", options.SIZE, "1GiB", text="bytes of pairs waiting for the model, at most"
    )
    caller_quotas_file: str | None = flag(
        "--caller-quotas-file",
        options.TEXT,
        text="JSON: how much of model and queue each caller may have, all replicas together; read again when "
        "it changes",
    )
    max_wait_seconds: float = flag(
        "--max-wait", options.DURATION, "5m", text="how long a caller without a deadline waits, at most"
    )
    max_connection_age_seconds: float = flag(
        "--max-connection-age",
        options.DURATION,
        "30m",
        text="after which a connection is closed gracefully, so that callers find new replicas",
    )
    drain_delay_seconds: float = flag(
        "--drain-delay", options.DURATION, "5s", text="after SIGTERM, still serve so long, as NOT_SERVING"
    )
    drain_timeout_seconds: float = flag(
        "--drain-timeout", options.DURATION, "30s", text="how long what is in flight may take to end"
    )
    log_format: str = flag("--log-format", options.choice("json", "text"), "json", text="of the log lines")
    log_level: str = flag(
        "--log-level", options.choice("debug", "info", "warning", "error"), "info", text="least level logged"
    )

    def __post_init__(self) -> None:
        """Reject invalid addresses, and limits that no request could satisfy."""
        for address in self.listen:
            check_address(address, flag_name="--listen", allow_unix=True)
        for address in self.listen_plaintext:
            check_address(address, flag_name="--listen-plaintext", allow_unix=True)
        check_address(self.http_listen, flag_name="--http-listen")
        if not self.max_request_bytes:
            message = "--max-request-bytes must be above 0"
            raise UsageError(message)
        if not self.max_field_bytes:
            message = "--max-field-bytes must be above 0"
            raise UsageError(message)
        if not self.max_wait_seconds:
            message = "--max-wait must be above 0"
            raise UsageError(message)
