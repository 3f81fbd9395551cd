"""Validate gRPC targets, and detect whether a target is on this machine."""

import ipaddress
import os
import re

from services.common.errors import UsageError

_RESOLVER = re.compile(r"(?:dns:(?://[^/]*/)?|ipv[46]:)")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_DNS = re.compile(r"(?://[^/@\s]*/)?(?P<address>.*)")
_ADDRESS = re.compile(
    r"(?P<host>\[[^\[\]@\s]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?):(?P<port>[0-9]{1,5})"
)
_TARGET_FORMS = "HOST:PORT, dns:///HOST:PORT or unix:PATH"
_MAX_PORT = 65_535

# In the order in which gRPC reads them; lower case only.
_HTTP_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


def check_target(target: str, *, flag_name: str, tls_flag: str) -> None:
    """Raise UsageError for a target that gRPC cannot parse or whose port it would guess.

    The core treats a URL as a host name, which no DNS server knows, and uses port 443 for a target without
    one. `tls_flag` is the flag that encrypts the calls.
    """
    reason = _target_fault(target, tls_flag)
    if reason is not None:
        # Before the @ there may be a password.
        shown = "" if "@" in target else f" {target!r}"
        message = f"{flag_name}{shown}: {reason}"
        raise UsageError(message)


def _target_fault(target: str, tls_flag: str) -> str | None:
    scheme, _, rest = target.partition(":")
    scheme = scheme.lower()
    if scheme in {"xds", "google-c2p"}:
        return None if rest.strip("/") else "it names no service"
    if scheme in {"unix", "unix-abstract"}:
        return _socket_fault(scheme, rest)
    if scheme in {"ipv4", "ipv6"}:
        version = int(scheme[-1])
        faults = (_address_fault(one, version) for one in rest.removeprefix("///").split(","))
        return next((fault for fault in faults if fault is not None), None)
    if scheme == "dns":
        found = _DNS.fullmatch(rest)
        return _address_fault(found["address"]) if found else f"it must be {_TARGET_FORMS}"
    if url := _URL.match(target):
        tls = f"; {tls_flag} encrypts the calls" if url["scheme"].lower() in {"https", "grpcs"} else ""
        return f"a gRPC target is not a URL; it must be {_TARGET_FORMS}{tls}"
    return _address_fault(target)


def _socket_fault(scheme: str, rest: str) -> str | None:
    if not rest.strip("/"):
        return "it names no socket"
    if scheme == "unix" and rest.startswith("//") and not rest.startswith("///"):
        return "after unix:// a path must begin with /, as in unix:///run/proxy.sock"
    return None


def _address_fault(address: str, version: int | None = None) -> str | None:
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return _spelling_fault(address)
    host = found["host"]
    try:
        literal = ipaddress.ip_address(host.strip("[]").partition("%")[0]).version
    except ValueError:
        literal = None
    if version is not None and literal != version:
        return f"after ipv{version}: every address must be an IPv{version} address with a port"
    if host.startswith("[") and literal != 6:  # noqa: PLR2004 - IP's
        return "what stands in brackets is not an IPv6 address"
    return None if 1 <= int(found["port"]) <= _MAX_PORT else f"a port is a number from 1 to {_MAX_PORT}"


def _spelling_fault(address: str) -> str:
    if "," in address:
        return "several addresses must be IP addresses, as in ipv4:10.0.0.1:50051,10.0.0.2:50051"
    if not address.startswith("[") and address.count(":") > 1:
        return "an IPv6 address must be in brackets and have a port, as in [::1]:50051"
    has_no_port = re.fullmatch(r"\[[^\[\]]+\]|[^:/@\s]+", address)
    return f"it {'has no port; it ' if has_no_port else ''}must be {_TARGET_FORMS}"


def is_local_target(target: str) -> bool:
    """Return whether traffic to the target stays on this machine, so that it needs no encryption."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    found = _RESOLVER.match(target)
    addresses = target[found.end() if found else 0 :].split(",")
    return all(_is_loopback(address.rpartition(":")[0].strip("[]")) for address in addresses)


def http_proxy_options(target: str) -> list[tuple[str, int]]:
    """Return the options that keep a channel to this machine away from the environment's HTTP proxy.

    gRPC sends every channel but one to a Unix socket through `grpc_proxy`, `https_proxy` or `http_proxy`. On
    the proxy's own machine, `localhost` is another one.
    """
    return [("grpc.enable_http_proxy", 0)] if is_local_target(target) else []


def http_proxy_variable(target: str) -> str | None:
    """Return the environment variable by which gRPC sends a channel through an HTTP proxy, if one is set."""
    if is_local_target(target):
        return None
    return next((name for name in _HTTP_PROXY_VARIABLES if os.environ.get(name)), None)


def _is_loopback(host: str) -> bool:
    try:
        return host.lower().rstrip(".") == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
