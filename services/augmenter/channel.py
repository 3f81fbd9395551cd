"""The channel to the proxy: plain, or by TLS, with a certificate or a token that says who asks."""

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
from grpc import aio

from services.augmenter.bearer import Token
from services.common.errors import UsageError

_KEEPALIVE_MS = 5 * 60 * 1000  # a server with gRPC's own settings drops who pings more often
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know the file's budget
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
_RESOLVER = re.compile(r"(?:dns:(?://[^/]*/)?|ipv[46]:)")


@dataclass(frozen=True, slots=True)
class Access:
    """How one is let in. `tls` None: in the clear; `token` None: without one."""

    tls: grpc.ChannelCredentials | None = None
    token: Token | None = None

    @classmethod
    def read(
        cls, *, tls_ca: str | None, tls_cert: str | None, tls_key: str | None, token_file: str | None
    ) -> Self:
        """From files, all of them looked at now: a wrong one is a UsageError, not a retry for ten minutes."""
        tls = None
        if tls_ca is not None:
            tls = _tls(tls_ca, None if tls_cert is None or tls_key is None else (tls_cert, tls_key))
        return cls(tls, None if token_file is None else Token(Path(token_file)))


IN_THE_CLEAR = Access()


def open_channel(target: str, access: Access = IN_THE_CLEAR) -> aio.Channel:
    """A channel; it connects when it is first used, and again whenever that is needed."""
    if access.tls is None:
        return aio.insecure_channel(target, options=_OPTIONS)
    return aio.secure_channel(target, access.tls, options=_OPTIONS)


def is_on_this_machine(target: str) -> bool:
    """Whether nobody else can listen in on the way to a target, encrypted or not."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    found = _RESOLVER.match(target)
    addresses = target[found.end() if found else 0 :].split(",")
    return all(_is_loopback(address.rpartition(":")[0].strip("[]")) for address in addresses)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(ca: str, own: tuple[str, str] | None) -> grpc.ChannelCredentials:
    """`ssl` looks at them first: gRPC does so at its first call, and does not say what is wrong."""
    roots = _read(ca, flag_name="--tls-ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        message = f"--tls-ca {ca}: holds no certificate in PEM"
        raise UsageError(message) from error
    if own is None:
        return grpc.ssl_channel_credentials(roots)
    cert, key = own
    chain, private = _read(cert, flag_name="--tls-cert"), _read(key, flag_name="--tls-key")
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")  # it would ask on the terminal
    except ssl.SSLError as error:
        message = f"--tls-cert {cert} and --tls-key {key}: not in PEM, not a pair, or behind a passphrase"
        raise UsageError(message) from error
    return grpc.ssl_channel_credentials(roots, private, chain)


def _read(path: str, *, flag_name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        message = f"{flag_name} {path}: {error.strerror}"
        raise UsageError(message) from error
