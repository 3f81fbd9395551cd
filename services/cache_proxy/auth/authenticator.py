"""Who calls, where a certificate or a token says so."""

from collections.abc import Iterable, Mapping

from services.cache_proxy.auth.caller import (
    Authenticator,
    Caller,
    Context,
    authenticated_caller,
    caller_from_metadata,
)
from services.cache_proxy.auth.caller_list import MAX_NAME_LENGTH, CallerList
from services.cache_proxy.errors import PermissionDeniedError, UnauthenticatedError
from services.common.file_reload import ReloadingFile

_SCHEME = "bearer"


def make_authenticator(
    *, use_certificates: bool, caller_list: ReloadingFile[CallerList] | None
) -> Authenticator:
    """How callers are told apart. `listed` None: nobody is refused, but `x-caller` is believed of those
    only whose certificate does not name them.
    """  # noqa: D205 - one thought
    if caller_list is not None:
        return _AllowListAuthenticator(caller_list, certificates=use_certificates)
    return _caller_from_certificate if use_certificates else caller_from_metadata


def _caller_from_certificate(context: Context) -> Caller:
    name = _certificate_name(context.auth_context())
    if name is None:
        return caller_from_metadata(context)
    return authenticated_caller(name, _request_metadata(context).get("x-priority"))


class _AllowListAuthenticator:
    """Lets in whom the list names, by certificate or else by token."""

    def __init__(self, listed: ReloadingFile[CallerList], *, certificates: bool) -> None:
        self._caller_list = listed
        self._use_certificates = certificates

    def __call__(self, context: Context) -> Caller:
        listed, metadata = self._caller_list.value, _request_metadata(context)
        certified = _certificate_name(context.auth_context()) if self._use_certificates else None
        name = certified if certified in listed.by_certificate else None
        if name is None and certified not in listed.denied:
            scheme, _, token = metadata.get("authorization", "").partition(" ")
            name = listed.name_for_token(token.strip()) if scheme.lower() == _SCHEME else None
            if name is None and certified is None:
                how = "is not known here" if token else "is needed (authorization: Bearer TOKEN)"
                message = f"a bearer token {how}"
                raise UnauthenticatedError(message)
        if name is None or name in listed.denied:
            message = f"{name or certified} may not call this proxy"
            raise PermissionDeniedError(message)
        return authenticated_caller(name, metadata.get("x-priority"))


def _request_metadata(context: Context) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def _certificate_name(peer: Mapping[str, Iterable[bytes]]) -> str | None:
    """The first URI (a SPIFFE id is one) of the certificate's subject alternative names, or else DNS name."""
    for kind in ("peer_uri", "peer_dns"):
        for found in peer.get(kind, ()):
            name = found.decode(errors="replace")
            return name if name.isprintable() and 0 < len(name) <= MAX_NAME_LENGTH else None
    return None
