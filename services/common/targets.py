"""gRPC targets: whether what is sent there stays on this machine, and what follows for a channel."""

import ipaddress
import os
import re

_RESOLVER = re.compile(r"(?:dns:(?://[^/]*/)?|ipv[46]:)")

_HTTP_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order; in lower case only


def is_on_this_machine(target: str) -> bool:
    """Whether nobody else can listen in on the way to a target, encrypted or not."""
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
    return [("grpc.enable_http_proxy", 0)] if is_on_this_machine(target) else []


def http_proxy_variable(target: str) -> str | None:
    """Return the environment variable by which gRPC sends a channel through an HTTP proxy, if one is set."""
    if is_on_this_machine(target):
        return None
    return next((name for name in _HTTP_PROXY_VARIABLES if os.environ.get(name)), None)


def _is_loopback(host: str) -> bool:
    try:
        return host.lower().rstrip(".") == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
