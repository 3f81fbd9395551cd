"""Connections to Redis that use renewed certificates, passwords and addresses without a restart.

redis-py keeps what it read first for as long as it can. Here, host names, certificates and passwords are read
again for each new connection.
"""

import asyncio
import ssl
from collections.abc import Mapping
from functools import partial
from typing import Any

from redis.asyncio.connection import Connection, RedisSSLContext, UnixDomainSocketConnection
from redis.credentials import CredentialProvider

from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.config.secret_file import read_secret
from services.cache_proxy.redis_client.host_lookup import resolve_host
from services.common.compat import override
from services.common.errors import UsageError
from services.common.file_reload import ReloadingFile, ReloadResult

ReloadingTlsContext = ReloadingFile[ssl.SSLContext]
_TLS_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class ReloadingCredentials(CredentialProvider):
    """The user and password of each new connection; a password file is read again when it changes.

    An open connection stays open: Redis checks a password only at the login.
    """

    def __init__(
        self,
        username: str | None,
        password: bytes | None,
        password_file: ReloadingFile[bytes | None] | None = None,
    ) -> None:
        self._username = username
        self._password = password
        self._password_file = password_file

    @override
    def get_credentials(self) -> tuple[Any, ...]:
        """Return the password, after the user if there is one."""
        password = self._password
        if self._password_file is not None:
            # Include a change that the reloader, which checks once a second, has not seen yet.
            self._password_file.reload_if_changed()
            password = self._password_file.value
        return (password,) if self._username is None else (self._username, password or b"")

    @override
    async def get_credentials_async(self) -> tuple[Any, ...]:
        return self.get_credentials()


def load_credentials(
    *,
    username: str | None,
    password: bytes | None,
    path: str | None,
    flag_name: str,
    metric_label: str,
    reloader: FileReloader | None,
) -> ReloadingCredentials | None:
    """Return the credentials for new connections, or None if there are none. Raises UsageError.

    `path` is the password file; it takes precedence over `password`. `metric_label` is one of
    `metrics.RELOADABLE_FILES`.
    """
    password_file: ReloadingFile[bytes | None] | None = None
    if path is not None:
        password_file = ReloadingFile(
            [path],
            partial(read_secret, path, flag_name=flag_name),
            on_reload=reloader.on_reload(metric_label) if reloader else _ignore_reload,
        )
        if reloader:
            reloader.add(password_file.reload_if_changed)
    if username is None and password is None and password_file is None:
        return None
    return ReloadingCredentials(username, password, password_file)


def load_tls_context(options: Mapping[str, Any], reloader: FileReloader | None) -> ReloadingTlsContext:
    """Return the TLS context of the files in a connection's options. Raises UsageError.

    With a `reloader`, it is replaced when the files change.
    """
    paths = [str(options[name]) for name in _TLS_FILE_OPTIONS if options.get(name)]
    files = f"the files for Redis ({', '.join(paths)})"
    given = {name.removeprefix("ssl_"): value for name, value in options.items() if name.startswith("ssl_")}
    # The defaults of `SSLConnection`. An empty passphrase keeps OpenSSL from prompting for one on the
    # terminal.
    defaults: dict[str, Any] = {"cert_reqs": "required", "check_hostname": True, "password": lambda: b""}

    def read() -> ssl.SSLContext:
        try:
            return RedisSSLContext(**(defaults | given)).get()
        except (ssl.SSLError, ValueError) as error:
            message = f"{files}: not in PEM, not a pair, or behind a passphrase"
            raise UsageError(message) from error
        except OSError as error:
            message = f"{files}: {error.strerror}"
            raise UsageError(message) from error

    tls = ReloadingFile(
        paths, read, on_reload=reloader.on_reload("cache_tls") if reloader else _ignore_reload
    )
    if reloader:
        reloader.add(tls.reload_if_changed)
    return tls


def reloading_connection_class(base_class: type[Any], tls: ReloadingTlsContext | None) -> type[Connection]:
    """Return a subclass that looks up its host and reads `tls` each time it connects."""

    class ReloadingConnection(base_class):  # type: ignore[misc]
        _address: str | None = None

        async def _connect(self) -> None:
            async with asyncio.timeout(self.socket_connect_timeout):
                addresses = await resolve_host(self.host)
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

    return ReloadingConnection


class UnixSocketConnection(UnixDomainSocketConnection):
    """A connection by a Unix socket whose errors keep their type.

    redis-py's own `_connect` also logs in. A timeout or a rejected password becomes a ConnectionError there,
    which is retried (`UnixDomainSocketConnection._connect`, 8.1).
    """

    @override
    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            self._reader, self._writer = await asyncio.open_unix_connection(path=self.path)


def _ignore_reload(_: ReloadResult) -> None:
    pass
