"""Bind a gRPC server to an address, and report why that fails."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc import aio

from services.common.errors import CommandError
from services.common.listening import ListenAddress, resolve_bindable_hosts

_MAX_UNIX_PATH_BYTES = 107
_OWNER_ONLY_UMASK = 0o177


def add_ports(
    server: aio.Server,
    text: str,
    *,
    flag_name: str = "--listen",
    credentials: Callable[[], grpc.ServerCredentials] | None = None,
    mode: int | None = None,
) -> str:
    """Bind `server` to the address `text` and return the bound address.

    `credentials` creates those of one listener. Without it, and on Unix sockets, there is no TLS. `mode` is
    the mode of a Unix socket; None: by the umask. Raises CommandError.
    """
    if text.startswith("unix:"):
        return _add_unix(server, text, flag_name=flag_name, mode=mode)
    address = ListenAddress.parse(text)
    port = address.port
    for host in resolve_bindable_hosts(text, flag_name=flag_name):
        try:
            if credentials is None:
                port = server.add_insecure_port(f"{host}:{port}")
            else:
                port = server.add_secure_port(f"{host}:{port}", credentials())
        except RuntimeError as error:
            unless = "" if credentials is None else ", or --tls-cert is of a kind that gRPC does not know"
            message = f"{flag_name} {text}: gRPC cannot listen there (taken just now{unless})"
            raise CommandError(message) from error
    return address.with_port(port)


def _add_unix(server: aio.Server, text: str, *, flag_name: str, mode: int | None) -> str:
    path = text.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("///") else path
    if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
        message = f"{flag_name} {text}: the path has more than {_MAX_UNIX_PATH_BYTES} bytes"
        raise CommandError(message)
    try:
        # No one connects before the mode is set.
        with _umask(None if mode is None else _OWNER_ONLY_UMASK):
            server.add_insecure_port(text)
        if mode is not None:
            Path(path).chmod(mode)
    except RuntimeError as error:
        message = f"{flag_name} {text}: gRPC cannot listen there (is the folder writable?)"
        raise CommandError(message) from error
    except OSError as error:
        message = f"--listen-mode {mode:04o}: {path}: {error.strerror}"
        raise CommandError(message) from error
    return text


@contextmanager
def _umask(mask: int | None) -> Iterator[None]:
    before = None if mask is None else os.umask(mask)
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)
