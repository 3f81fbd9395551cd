"""Parse `--cache-url` strictly: a URL that can be read in two ways is refused, and never shown.

A password that should have been percent-encoded makes a URL that every library reads in its own way. Pieces
of it then reach logs and DNS as a host, a port or a database.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from services.common.errors import UsageError

SCHEMES = (
    "embedded",
    "memory",
    "redis",
    "rediss",
    "valkey",
    "valkeys",
    "unix",
    "redis+cluster",
    "redis+sentinel",
)
TLS_CAPABLE_SCHEMES = ("rediss", "redis+cluster", "redis+sentinel")
_SCHEME_ALIASES = {"valkey": "redis", "valkeys": "rediss"}
_TLS_URL_PARAMETERS = frozenset({"ssl_certfile", "ssl_keyfile"})
_PARAMETERS_BY_SCHEME = {
    "redis": frozenset({"db"}),
    "rediss": _TLS_URL_PARAMETERS | {"db"},
    "unix": frozenset({"db"}),
    "redis+cluster": _TLS_URL_PARAMETERS,
    "redis+sentinel": _TLS_URL_PARAMETERS,
}
DEFAULT_REDIS_PORT = 6379
_DEFAULT_PORTS = {
    "redis": DEFAULT_REDIS_PORT,
    "rediss": DEFAULT_REDIS_PORT,
    "redis+cluster": DEFAULT_REDIS_PORT,
    "redis+sentinel": 26379,
}
_MAX_PORT = 65_535
_URL = re.compile(
    r"""
    (?P<scheme>[a-z+]+)://
    (?:(?P<login>[^/?\#@\[\]]*)@)?  # one @ and no more: another would belong to a password
    (?P<hosts>[^/?\#@]*)
    (?P<path>/[^?\#]*)?
    (?:\?(?P<query>[^\#@]*))?
    """,
    re.VERBOSE,
)
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d+))?"
)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_BAD_CHARACTER = re.compile(r"[\x00-\x20\x7f\\^`{|}<>\"]")
# Of redis-py and others: shown when refused. Any other name may be a piece of a password.
_LIBRARY_PARAMETERS = frozenset(
    {
        "client_name",
        "db",
        "decode_responses",
        "encoding",
        "health_check_interval",
        "max_connections",
        "password",
        "protocol",
        "retry_on_timeout",
        "skip_full_coverage_check",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_timeout",
        "ssl",
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_min_version",
        "timeout",
        "username",
    }
)
_ENCODING_ADVICE = (
    "percent-encode user and password (%40 for @, %2F for /), or give them as --cache-username and "
    "--cache-password-file"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheUrl:
    """The parts of a URL. `scheme` is one of redis-py's or of ours, never `valkey`."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    """The socket's, or the folder's of `embedded:`."""
    service: str = ""
    database: int = 0
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    client_certificate: dict[str, str] = field(default_factory=dict)
    """`ssl_certfile` and `ssl_keyfile`, where given."""


def parse(url: str) -> CacheUrl:
    """The parts. Raises UsageError, with none of the URL in its line but the name of a parameter."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in SCHEMES:
        _reject(f"it must begin with one of {', '.join(f'{name}:' for name in SCHEMES)}")
    if scheme == "memory":
        if rest.strip("/"):
            _reject("memory: has nothing after its colon")
        return CacheUrl(scheme=scheme)
    if scheme == "embedded":
        if "?" in rest:
            _reject("embedded: takes a folder and no parameters")
        return CacheUrl(scheme=scheme, path=rest)
    scheme = _SCHEME_ALIASES.get(scheme, scheme)
    found = _URL.fullmatch(url)
    path = (found and found["path"]) or ""
    is_ambiguous = "@" in path and not (
        scheme == "unix" and found and not found["login"] and not found["hosts"]
    )
    if found is None or is_ambiguous or _BAD_PERCENT.search(url) or _BAD_CHARACTER.search(url):
        _reject(f"its parts cannot be told apart; {_ENCODING_ADVICE}")
    hosts = tuple(_parse_host(item, _DEFAULT_PORTS[scheme]) for item in _split_hosts(scheme, found["hosts"]))
    parameters = _parse_parameters(found["query"], allowed=_PARAMETERS_BY_SCHEME[scheme])
    place = _parse_path(scheme, path, parameters.pop("db", None))
    if "ssl_keyfile" in parameters and "ssl_certfile" not in parameters:
        _reject("ssl_keyfile without ssl_certfile")
    name, _, password = (found["login"] or "").partition(":")
    return CacheUrl(
        scheme=scheme,
        hosts=hosts,
        path=place.path,
        service=place.service,
        database=place.database,
        username=_decode_percent(name) or None,
        password=unquote_to_bytes(password) or None,
        client_certificate=parameters,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PathParts:
    path: str = ""
    service: str = ""
    database: int = 0


def _parse_path(scheme: str, path: str, parameter: str | None) -> _PathParts:
    if scheme == "unix":
        if len(path) < len("/x"):
            _reject("unix:// is followed by the socket's path from the root, as in unix:///run/redis.sock")
        return _PathParts(path=_decode_percent(path), database=_parse_database(parameter or ""))
    path = path.removeprefix("/")
    if scheme == "redis+cluster":
        if path:
            _reject("a Cluster has one database, so nothing comes after its hosts")
        return _PathParts()
    service = ""
    if scheme == "redis+sentinel":
        service, _, path = path.partition("/")
        if not service:
            _reject("it names no service, as in redis+sentinel://HOST:PORT,HOST:PORT/SERVICE")
    if path and parameter is not None:
        _reject("it names its database twice")
    return _PathParts(service=_decode_percent(service), database=_parse_database(path or parameter or ""))


def _split_hosts(scheme: str, hosts: str) -> list[str]:
    if scheme == "unix":
        if hosts:
            _reject(
                "unix:// has no host: a path from the root follows, as in unix:///run/redis.sock; "
                f"{_ENCODING_ADVICE}"
            )
        return []
    return hosts.split(",") if scheme in {"redis+cluster", "redis+sentinel"} else [hosts]


def _parse_host(item: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(item)
    if found is None:
        _reject(f"it has no host, or one that is not HOST or HOST:PORT; {_ENCODING_ADVICE}")
    name = found["name"].strip("[]")
    if name != found["name"]:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            _reject("what stands in brackets is not an IPv6 address")
    number = int(found["port"]) if found["port"] else default_port
    if not 1 <= number <= _MAX_PORT:
        _reject(f"a port is not from 1 to {_MAX_PORT}")
    return name, number


def _parse_parameters(query: str | None, *, allowed: frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name not in allowed:
            shown = f"parameter {name}" if name in _LIBRARY_PARAMETERS else "a parameter"
            known = ", ".join(sorted(allowed))
            _reject(f"{shown} is not one of those that this kind of URL takes ({known})")
        if name in found or not value:
            _reject(f"parameter {name} must have one value")
        found[name] = _decode_percent(value)
    return found


def _parse_database(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", text):
        _reject(f"its database is not a number, as in redis://HOST:PORT/0; {_ENCODING_ADVICE}")
    return int(text)


def _decode_percent(encoded: str) -> str:
    try:
        return unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        _reject(f"what is percent-encoded is not UTF-8; {_ENCODING_ADVICE}")


def _reject(reason: str) -> NoReturn:
    message = f"--cache-url: {reason}"
    raise UsageError(message) from None
