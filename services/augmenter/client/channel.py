"""The gRPC channel to the proxy: plaintext or TLS, with a client certificate or a bearer token."""

from dataclasses import dataclass
from typing import Self

from services.common.bearer import Token
from services.common.file_reload import ReloadingFile
from services.common.reloading_channel import ReloadingChannel
from services.common.tls import PemBundle, PemFiles

# A server with gRPC's default settings closes the connection of a client that pings more often.
_KEEPALIVE_MS = 5 * 60 * 1000
_CHANNEL_ARGS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC's own retries do not know the file's retry budget.
    ("grpc.enable_retries", 0),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    # The timeout also applies to sent bytes that are never acknowledged, as when the machine is gone.
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class ProxyCredentials:
    """Credentials for the connection. `tls` None: plaintext. `token` None: no bearer token."""

    tls: ReloadingFile[PemBundle] | None = None
    token: Token | None = None

    @classmethod
    def load(cls, files: PemFiles, *, token_file: str | None) -> Self:
        """Load the credentials from files.

        All files are read now, so that an invalid one is a UsageError and not ten minutes of retries.
        """
        tls = None if files.ca is None else files.watch()
        return cls(tls, None if token_file is None else Token(token_file))


PLAINTEXT = ProxyCredentials()


def open_channel(
    target: str, credentials: ProxyCredentials = PLAINTEXT, *, max_call_seconds: float = 0
) -> ReloadingChannel:
    """Open a channel. It connects on first use, and reconnects when needed."""
    return ReloadingChannel(
        target, tls=credentials.tls, options=_CHANNEL_ARGS, max_call_seconds=max_call_seconds
    )
