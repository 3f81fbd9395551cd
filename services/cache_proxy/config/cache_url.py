"""Parse `--cache-url` strictly: reject an ambiguous URL, and never show it.

A password that should have been percent-encoded makes a URL that each library parses differently. Parts of
the password then reach logs and DNS as a host, a port or a database.
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
    # Only one @: a second one would belong to a password.
    (?:(?P<login>[^/?\#@\[\]]*)@)?
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
# Parameters of redis-py and other libraries, which an error may show. Other names may be part of a password.
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
    """The parts of a cache URL. `scheme` is normalized: `redis` also stands for `valkey`."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    """The path of the Unix socket, or the folder of `embedded:`."""
    service: str = ""
    database: int = 0
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    client_certificate: dict[str, str] = field(default_factory=dict)
    """The parameters `ssl_certfile` and `ssl_keyfile`, if given."""


def parse(url: str) -> CacheUrl:
    """Parse a cache URL.

    Raises `UsageError`, whose message contains no part of the URL except the name of a parameter.
    """
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
    match = _URL.fullmatch(url)
    path = (match and match["path"]) or ""
    is_ambiguous = "@" in path and not (
        scheme == "unix" and match and not match["login"] and not match["hosts"]
    )
    if match is None or is_ambiguous or _BAD_PERCENT.search(url) or _BAD_CHARACTER.search(url):
        _reject(f"its parts are ambiguous; {_ENCODING_ADVICE}")
    hosts = tuple(_parse_host(item, _DEFAULT_PORTS[scheme]) for item in _split_hosts(scheme, match["hosts"]))
    parameters = _parse_parameters(match["query"], allowed=_PARAMETERS_BY_SCHEME[scheme])
    parts = _parse_path(scheme, path, parameters.pop("db", None))
    if "ssl_keyfile" in parameters and "ssl_certfile" not in parameters:
        _reject("ssl_keyfile without ssl_certfile")
    name, _, password = (match["login"] or "").partition(":")
    return CacheUrl(
        scheme=scheme,
        hosts=hosts,
        path=parts.path,
        service=parts.service,
        database=parts.database,
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
    match = _HOST.fullmatch(item)
    if match is None:
        _reject(f"it has no host, or one that is not HOST or HOST:PORT; {_ENCODING_ADVICE}")
    name = match["name"].strip("[]")
    if name != match["name"]:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            _reject("what stands in brackets is not an IPv6 address")
    port = int(match["port"]) if match["port"] else default_port
    if not 1 <= port <= _MAX_PORT:
        _reject(f"a port is not from 1 to {_MAX_PORT}")
    return name, port


def _parse_parameters(query: str | None, *, allowed: frozenset[str]) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name not in allowed:
            shown = f"parameter {name}" if name in _LIBRARY_PARAMETERS else "a parameter"
            known = ", ".join(sorted(allowed))
            _reject(f"{shown} is not one of those that this kind of URL takes ({known})")
        if name in parameters or not value:
            _reject(f"parameter {name} must have one value")
        parameters[name] = _decode_percent(value)
    return parameters


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


def redact_url(url: str) -> str:
    """Return the URL without user, password and parameters, for logs and errors."""
    address, question, _ = url.partition("?")
    scheme, slashes, rest = address.partition("://")
    # Cut at the last @: a password that should have been percent-encoded may contain others, and slashes.
    if "@" in rest:
        address = f"{scheme}{slashes}***@{rest.rpartition('@')[2]}"
    return f"{address}?***" if question else address


def _reject(reason: str) -> NoReturn:
    message = f"--cache-url: {reason}"
    raise UsageError(message) from None
