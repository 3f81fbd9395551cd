"""gRPC targets: whether what is sent there stays on this machine."""

import ipaddress
import re

_RESOLVER = re.compile(r"(?:dns:(?://[^/]*/)?|ipv[46]:)")


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
