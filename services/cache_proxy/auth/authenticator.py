"""Identify callers by client certificate or bearer token, as the settings require."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from services.cache_proxy.auth.caller import (
    Authenticator,
    Caller,
    Context,
    authenticated_caller,
    caller_from_metadata,
)
from services.cache_proxy.auth.caller_list import MAX_NAME_LENGTH, CallerList, watch_caller_list
from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.auth.server_tls import server_credentials
from services.cache_proxy.config.auth_settings import CallerAuthSettings
from services.cache_proxy.errors import PermissionDeniedError, UnauthenticatedError
from services.common.file_reload import ReloadingFile
from services.common.grpc_target import is_local_target

_SCHEME = "bearer"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallerAuth:
    """How callers are identified, and the TLS credentials of each listener; None means plaintext."""

    authenticate: Authenticator
    credentials: Callable[[], grpc.ServerCredentials] | None


def load_caller_auth(
    settings: CallerAuthSettings,
    reloader: FileReloader,
    *,
    listen: Sequence[str],
    plaintext: Sequence[str] = (),
) -> CallerAuth:
    """Read the certificate and the caller list that the settings name, and have `reloader` reload them.

    `listen` are the addresses that have TLS if there is a certificate, `plaintext` those that never have.
    Raise UsageError if a file cannot be used.
    """
    caller_list = credentials = None
    if settings.tls_cert is not None:
        pem = settings.pem_files.watch(on_reload=reloader.on_reload("listen_tls"))
        reloader.add(pem.reload_if_changed)
        credentials = partial(server_credentials, pem)
    if settings.caller_tokens_file is not None:
        caller_list = watch_caller_list(
            settings.caller_tokens_file, on_reload=reloader.on_reload("caller_tokens")
        )
        reloader.add(caller_list.reload_if_changed)
    _warn_about_plaintext(settings, (*plaintext, *(listen if credentials is None else ())))
    authenticate = make_authenticator(
        use_certificates=settings.tls_client_ca is not None, caller_list=caller_list
    )
    return CallerAuth(authenticate, credentials)


def _warn_about_plaintext(settings: CallerAuthSettings, addresses: Sequence[str]) -> None:
    """Log a warning about plaintext addresses that other machines can reach, where it matters."""
    for address in addresses:
        if is_local_target(address):
            continue
        if settings.caller_tokens_file is not None:
            _log.warning(
                "bearer tokens are received without TLS on %s; set --tls-cert, or terminate TLS in front of "
                "the proxy",
                address,
            )
        elif settings.tls_client_ca is not None:
            _log.warning(
                "callers need no certificate on %s; use a loopback address, or set --caller-tokens-file",
                address,
            )


def make_authenticator(
    *, use_certificates: bool, caller_list: ReloadingFile[CallerList] | None
) -> Authenticator:
    """Return the authenticator for these settings.

    Without a `caller_list` every caller is admitted, and `x-caller` names callers whose certificate does not.
    """
    if caller_list is not None:
        return _AllowListAuthenticator(caller_list, use_certificates=use_certificates)
    return _caller_from_certificate if use_certificates else caller_from_metadata


def _caller_from_certificate(context: Context) -> Caller:
    name = _certificate_name(context.auth_context())
    if name is None:
        return caller_from_metadata(context)
    return authenticated_caller(name, _request_metadata(context).get("x-priority"))


class _AllowListAuthenticator:
    """Admit callers that the list names, identified by certificate or else by bearer token."""

    def __init__(self, caller_list: ReloadingFile[CallerList], *, use_certificates: bool) -> None:
        self._caller_list = caller_list
        self._use_certificates = use_certificates

    def __call__(self, context: Context) -> Caller:
        caller_list = self._caller_list.value
        metadata = _request_metadata(context)
        certified = _certificate_name(context.auth_context()) if self._use_certificates else None
        name = certified if certified in caller_list.by_certificate else None
        # A certificate that the list does not name may come with a token that it does. A denied one may not.
        if name is None and certified not in caller_list.denied:
            scheme, _, token = metadata.get("authorization", "").partition(" ")
            name = caller_list.name_for_token(token.strip()) if scheme.lower() == _SCHEME else None
            if name is None and certified is None:
                how = "is not known here" if token else "is needed (authorization: Bearer TOKEN)"
                message = f"a bearer token {how}"
                raise UnauthenticatedError(message)
        if name is None or name in caller_list.denied:
            message = f"{name or certified} may not call this proxy"
            raise PermissionDeniedError(message)
        return authenticated_caller(name, metadata.get("x-priority"))


def _request_metadata(context: Context) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def _certificate_name(peer: Mapping[str, Iterable[bytes]]) -> str | None:
    """Return the first URI of the certificate's subject alternative names, or else the first DNS name.

    A SPIFFE id is such a URI. Return None if there is neither, or if the name is too long or not printable.
    """
    for kind in ("peer_uri", "peer_dns"):
        for encoded in peer.get(kind, ()):
            name = encoded.decode(errors="replace")
            return name if name.isprintable() and 0 < len(name) <= MAX_NAME_LENGTH else None
    return None
