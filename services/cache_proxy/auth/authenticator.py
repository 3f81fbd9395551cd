"""Who calls, where a certificate or a token says so."""

from collections.abc import Iterable, Mapping

from services.cache_proxy.auth.caller import Caller, Context, Identify, by_metadata, of_name
from services.cache_proxy.auth.caller_list import MAX_NAME, CallerList
from services.cache_proxy.errors import Forbidden, Unauthenticated
from services.common.file_reload import Renewed

_SCHEME = "bearer"


def identification(*, certificates: bool, listed: Renewed[CallerList] | None) -> Identify:
    """How callers are told apart. `listed` None: nobody is refused, but `x-caller` is believed of those
    only whose certificate does not name them.
    """  # noqa: D205 - one thought
    if listed is not None:
        return _Listed(listed, certificates=certificates)
    return _by_certificate if certificates else by_metadata


def _by_certificate(context: Context) -> Caller:
    name = _certificate_name(context.auth_context())
    if name is None:
        return by_metadata(context)
    return of_name(name, _metadata(context).get("x-priority"))


class _Listed:
    """Lets in whom the list names, by certificate or else by token."""

    def __init__(self, listed: Renewed[CallerList], *, certificates: bool) -> None:
        self._listed = listed
        self._certificates = certificates

    def __call__(self, context: Context) -> Caller:
        listed, metadata = self._listed.value, _metadata(context)
        certified = _certificate_name(context.auth_context()) if self._certificates else None
        name = certified if certified in listed.by_certificate else None
        if name is None and certified not in listed.denied:
            scheme, _, token = metadata.get("authorization", "").partition(" ")
            name = listed.of_token(token.strip()) if scheme.lower() == _SCHEME else None
            if name is None and certified is None:
                how = "is not known here" if token else "is needed (authorization: Bearer TOKEN)"
                message = f"a bearer token {how}"
                raise Unauthenticated(message)
        if name is None or name in listed.denied:
            message = f"{name or certified} may not call this proxy"
            raise Forbidden(message)
        return of_name(name, metadata.get("x-priority"))


def _metadata(context: Context) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def _certificate_name(peer: Mapping[str, Iterable[bytes]]) -> str | None:
    """The first URI (a SPIFFE id is one) of the certificate's subject alternative names, or else DNS name."""
    for kind in ("peer_uri", "peer_dns"):
        for found in peer.get(kind, ()):
            name = found.decode(errors="replace")
            return name if name.isprintable() and 0 < len(name) <= MAX_NAME else None
    return None
