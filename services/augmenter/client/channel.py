"""The channel to the proxy: plain, or by TLS, with a certificate or a token that says who asks."""

from dataclasses import dataclass
from typing import Self

from services.common.bearer import Token
from services.common.file_reload import Renewed
from services.common.reloading_channel import RenewedChannel
from services.common.tls import Pem, PemFiles

_KEEPALIVE_MS = 5 * 60 * 1000  # a server with gRPC's own settings drops who pings more often
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know the file's budget
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),  # also for bytes that nobody acknowledges: the machine is gone
]


@dataclass(frozen=True, slots=True)
class Access:
    """How one is let in. `tls` None: in the clear; `token` None: without one."""

    tls: Renewed[Pem] | None = None
    token: Token | None = None

    @classmethod
    def read(cls, files: PemFiles, *, token_file: str | None) -> Self:
        """From files, all of them looked at now: a wrong one is a UsageError, not a retry for ten minutes."""
        tls = None if files.ca is None else files.follow()
        return cls(tls, None if token_file is None else Token(token_file))


IN_THE_CLEAR = Access()


def open_channel(
    target: str, access: Access = IN_THE_CLEAR, *, longest_call_seconds: float = 0
) -> RenewedChannel:
    """A channel; it connects when it is first used, and again whenever that is needed."""
    return RenewedChannel(target, tls=access.tls, options=_OPTIONS, longest_call_seconds=longest_call_seconds)
