"""Connections to Redis that follow names and files: redis-py keeps what it read first as long as it can."""

import asyncio
import ssl
from collections.abc import Mapping
from functools import partial
from typing import Any

from redis.asyncio.connection import Connection, RedisSSLContext, UnixDomainSocketConnection
from redis.credentials import CredentialProvider

from services.cache_proxy.auth.reloader import Renewals
from services.cache_proxy.config.settings import read_secret
from services.cache_proxy.redis_client.host_lookup import addresses_of
from services.common.errors import UsageError
from services.common.file_reload import Look, Renewed

Tls = Renewed[ssl.SSLContext]
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class Login(CredentialProvider):
    """The user and password of each new connection; a password in a file is read again when it changes.

    A connection that is open stays so: Redis asks for a password once.
    """

    def __init__(
        self, username: str | None, password: bytes | None, followed: Renewed[bytes | None] | None = None
    ) -> None:
        self._username = username
        self._password = password
        self._followed = followed

    def get_credentials(self) -> tuple[Any, ...]:
        """Return the user, if there is one, and the password."""
        password = self._password
        if self._followed is not None:
            self._followed.look()  # a renewal in this second counts too
            password = self._followed.value
        return (password,) if self._username is None else (self._username, password or b"")

    async def get_credentials_async(self) -> tuple[Any, ...]:
        """Return the same, without waiting."""
        return self.get_credentials()


def follow_login(
    *, username: str | None, password: bytes | None, path: str | None, flag_name: str, files: str,
    renewals: Renewals | None,
) -> Login | None:  # fmt: skip
    """Return how to log in; None: not at all. `files` is one of `metrics.RENEWED`. Raises UsageError."""
    followed: Renewed[bytes | None] | None = None
    if path is not None:
        followed = Renewed(
            [path],
            partial(read_secret, path, flag_name=flag_name),
            tell=renewals.teller(files) if renewals else _nobody,
        )
        if renewals:
            renewals.add(followed.look)
    if username is None and password is None and followed is None:
        return None
    return Login(username, password, followed)


def follow(options: Mapping[str, Any], renewals: Renewals | None) -> Tls:
    """What the files in a connection's options hold; with `renewals` also later. Raises UsageError."""
    paths = [str(options[name]) for name in _FILES if options.get(name)]
    named = f"the files for Redis ({', '.join(paths)})"
    given = {name.removeprefix("ssl_"): value for name, value in options.items() if name.startswith("ssl_")}
    # As an `SSLConnection` has them; and a passphrase is not asked for on the terminal.
    defaults: dict[str, Any] = {"cert_reqs": "required", "check_hostname": True, "password": lambda: b""}

    def read() -> ssl.SSLContext:
        try:
            return RedisSSLContext(**(defaults | given)).get()
        except (ssl.SSLError, ValueError) as error:
            message = f"{named}: not in PEM, not a pair, or behind a passphrase"
            raise UsageError(message) from error
        except OSError as error:
            message = f"{named}: {error.strerror}"
            raise UsageError(message) from error

    tls = Renewed(paths, read, tell=renewals.teller("cache_tls") if renewals else _nobody)
    if renewals:
        renewals.add(tls.look)
    return tls


def following(kind: type[Any], tls: Tls | None) -> type[Connection]:
    """Return a kind of connection that looks up its host and reads `tls` each time it connects."""

    class Following(kind):  # type: ignore[misc]
        _address: str | None = None

        async def _connect(self) -> None:
            async with asyncio.timeout(self.socket_connect_timeout):
                addresses = await addresses_of(self.host)
                for number, address in enumerate(addresses, start=1):
                    self._address = address
                    try:
                        await super()._connect()
                    except OSError:
                        if number == len(addresses):
                            raise
                    else:
                        return

        def _connection_arguments(self) -> Mapping[str, Any]:
            if tls is not None:
                self.ssl_context.context = tls.value
            arguments = {**super()._connection_arguments(), "host": self._address}
            if "ssl" in arguments:
                arguments["server_hostname"] = self.host
            return arguments

    return Following


class UnixConnection(UnixDomainSocketConnection):
    """A connection by a Unix socket whose errors keep their kind.

    redis-py's own logs in within `_connect`, too, where a timeout or a refused password becomes a
    ConnectionError, which is worth another try (`UnixDomainSocketConnection._connect`, 8.1).
    """

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            self._reader, self._writer = await asyncio.open_unix_connection(path=self.path)


def _nobody(_: Look) -> None:
    pass
