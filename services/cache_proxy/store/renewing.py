"""Connections to Redis by TLS that follow its files: redis-py keeps what it read first as long as it can."""

import ssl
from collections.abc import Mapping
from typing import Any

from redis.asyncio.connection import RedisSSLContext, SSLConnection

from services.cache_proxy.access.renewals import Renewals
from services.common.errors import UsageError
from services.common.renewal import Look, Renewed

Tls = Renewed[ssl.SSLContext]
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


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


def following(kind: type[Any], tls: Tls) -> type[SSLConnection]:
    """Connections of this kind that look there each time they connect."""

    class Following(kind):  # type: ignore[misc]
        def _connection_arguments(self) -> Mapping[str, Any]:
            self.ssl_context.context = tls.value
            arguments: Mapping[str, Any] = super()._connection_arguments()
            return arguments

    return Following


def _nobody(_: Look) -> None:
    pass
