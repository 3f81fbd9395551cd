"""The channel to the proxy: plain, or by TLS, with a certificate or a token that says who asks."""

from dataclasses import dataclass
from typing import Self

from services.common.bearer import Token
from services.common.file_reload import ReloadingFile
from services.common.reloading_channel import ReloadingChannel
from services.common.tls import PemBundle, PemFiles

_KEEPALIVE_MS = 5 * 60 * 1000  # a server with gRPC's own settings drops who pings more often
_CHANNEL_ARGS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know the file's budget
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),  # also for bytes that nobody acknowledges: the machine is gone
]


@dataclass(frozen=True, slots=True)
class ProxyCredentials:
    """How one is let in. `tls` None: in the clear; `token` None: without one."""

    tls: ReloadingFile[PemBundle] | None = None
    token: Token | None = None

    @classmethod
    def load(cls, files: PemFiles, *, token_file: str | None) -> Self:
        """From files, all of them looked at now: a wrong one is a UsageError, not a retry for ten minutes."""
        tls = None if files.ca is None else files.watch()
        return cls(tls, None if token_file is None else Token(token_file))


PLAINTEXT = ProxyCredentials()


def open_channel(
    target: str, credentials: ProxyCredentials = PLAINTEXT, *, max_call_seconds: float = 0
) -> ReloadingChannel:
    """A channel; it connects when it is first used, and again whenever that is needed."""
    return ReloadingChannel(
        target, tls=credentials.tls, options=_CHANNEL_ARGS, max_call_seconds=max_call_seconds
    )
