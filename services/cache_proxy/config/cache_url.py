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
    "embedded", "memory", "redis", "rediss", "valkey", "valkeys", "unix", "redis+cluster", "redis+sentinel",
)  # fmt: skip
ENCRYPTED = ("rediss", "redis+cluster", "redis+sentinel")
_SAME = {"valkey": "redis", "valkeys": "rediss"}
_CERTIFICATE = frozenset({"ssl_certfile", "ssl_keyfile"})
_PARAMETERS = {
    "redis": frozenset({"db"}),
    "rediss": _CERTIFICATE | {"db"},
    "unix": frozenset({"db"}),
    "redis+cluster": _CERTIFICATE,
    "redis+sentinel": _CERTIFICATE,
}
REDIS_PORT = 6379
_PORTS = {
    "redis": REDIS_PORT, "rediss": REDIS_PORT, "redis+cluster": REDIS_PORT, "redis+sentinel": 26379,
}  # fmt: skip
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
        "client_name", "db", "decode_responses", "encoding", "health_check_interval", "max_connections",
        "password", "protocol", "retry_on_timeout", "skip_full_coverage_check", "socket_connect_timeout",
        "socket_keepalive", "socket_timeout", "ssl", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs",
        "ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "ssl_min_version", "timeout", "username",
    }
)  # fmt: skip
_ADVICE = (
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
    certificate: dict[str, str] = field(default_factory=dict)
    """`ssl_certfile` and `ssl_keyfile`, where given."""


def parse(url: str) -> CacheUrl:
    """The parts. Raises UsageError, with none of the URL in its line but the name of a parameter."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in SCHEMES:
        _refuse(f"it must begin with one of {', '.join(f'{name}:' for name in SCHEMES)}")
    if scheme == "memory":
        if rest.strip("/"):
            _refuse("memory: has nothing after its colon")
        return CacheUrl(scheme=scheme)
    if scheme == "embedded":
        if "?" in rest:
            _refuse("embedded: takes a folder and no parameters")
        return CacheUrl(scheme=scheme, path=rest)
    scheme = _SAME.get(scheme, scheme)
    found = _URL.fullmatch(url)
    path = (found and found["path"]) or ""
    is_ambiguous = "@" in path and not (
        scheme == "unix" and found and not found["login"] and not found["hosts"]
    )
    if found is None or is_ambiguous or _BAD_PERCENT.search(url) or _BAD_CHARACTER.search(url):
        _refuse(f"its parts cannot be told apart; {_ADVICE}")
    hosts = tuple(_host(item, _PORTS[scheme]) for item in _items(scheme, found["hosts"]))
    parameters = _parameters(found["query"], allowed=_PARAMETERS[scheme])
    place = _place(scheme, path, parameters.pop("db", None))
    if "ssl_keyfile" in parameters and "ssl_certfile" not in parameters:
        _refuse("ssl_keyfile without ssl_certfile")
    name, _, password = (found["login"] or "").partition(":")
    return CacheUrl(
        scheme=scheme,
        hosts=hosts,
        path=place.path,
        service=place.service,
        database=place.database,
        username=_text(name) or None,
        password=unquote_to_bytes(password) or None,
        certificate=parameters,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    path: str = ""
    service: str = ""
    database: int = 0


def _place(scheme: str, path: str, parameter: str | None) -> _Place:
    if scheme == "unix":
        if len(path) < len("/x"):
            _refuse("unix:// is followed by the socket's path from the root, as in unix:///run/redis.sock")
        return _Place(path=_text(path), database=_database(parameter or ""))
    path = path.removeprefix("/")
    if scheme == "redis+cluster":
        if path:
            _refuse("a Cluster has one database, so nothing comes after its hosts")
        return _Place()
    service = ""
    if scheme == "redis+sentinel":
        service, _, path = path.partition("/")
        if not service:
            _refuse("it names no service, as in redis+sentinel://HOST:PORT,HOST:PORT/SERVICE")
    if path and parameter is not None:
        _refuse("it names its database twice")
    return _Place(service=_text(service), database=_database(path or parameter or ""))


def _items(scheme: str, hosts: str) -> list[str]:
    if scheme == "unix":
        if hosts:
            _refuse(
                f"unix:// has no host: a path from the root follows, as in unix:///run/redis.sock; {_ADVICE}"
            )
        return []
    return hosts.split(",") if scheme in {"redis+cluster", "redis+sentinel"} else [hosts]


def _host(item: str, port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(item)
    if found is None:
        _refuse(f"it has no host, or one that is not HOST or HOST:PORT; {_ADVICE}")
    name = found["name"].strip("[]")
    if name != found["name"]:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            _refuse("what stands in brackets is not an IPv6 address")
    number = int(found["port"]) if found["port"] else port
    if not 1 <= number <= _MAX_PORT:
        _refuse(f"a port is not from 1 to {_MAX_PORT}")
    return name, number


def _parameters(query: str | None, *, allowed: frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name not in allowed:
            shown = f"parameter {name}" if name in _LIBRARY_PARAMETERS else "a parameter"
            known = ", ".join(sorted(allowed))
            _refuse(f"{shown} is not one of those that this kind of URL takes ({known})")
        if name in found or not value:
            _refuse(f"parameter {name} must have one value")
        found[name] = _text(value)
    return found


def _database(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", text):
        _refuse(f"its database is not a number, as in redis://HOST:PORT/0; {_ADVICE}")
    return int(text)


def _text(encoded: str) -> str:
    try:
        return unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        _refuse(f"what is percent-encoded is not UTF-8; {_ADVICE}")


def _refuse(reason: str) -> NoReturn:
    message = f"--cache-url: {reason}"
    raise UsageError(message) from None
