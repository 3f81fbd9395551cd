"""Authentication of callers by certificate, by token, by `x-caller`, or not at all.

Over 250 lines, because of the tables of certificates, tokens and expected callers.
"""

import hashlib
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from services.cache_proxy.auth import caller_list
from services.cache_proxy.auth.authenticator import make_authenticator
from services.cache_proxy.auth.caller import Authenticator, Context
from services.cache_proxy.auth.server_tls import server_credentials
from services.cache_proxy.errors import ProxyError
from services.common.errors import UsageError
from services.common.file_reload import ReloadResult
from services.common.tls import PemFiles
from tests.support.certificates import CertificateAuthority, SignedCertificate
from tests.support.processes import ROOT

WhoAmI = Callable[..., "aio.UnaryUnaryCall[bytes, bytes]"]
_LIST = f"""
# who may call
pricing sha256:{hashlib.sha256(b"of-pricing").hexdigest()}
pricing sha256:{hashlib.sha256(b"the-next-of-pricing").hexdigest()}   # during a replacement
gone    sha256:{hashlib.sha256(b"of-gone").hexdigest()}
gone    denied
spiffe://example.org/listed certificate
spiffe://example.org/barred certificate
spiffe://example.org/barred denied
first.example denied
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SignedCertificate]:
    """Return certificates of one authority: the server's, and callers' with names of every kind."""
    authority = CertificateAuthority(tmp_path_factory.mktemp("identify"))
    spiffe = "URI:spiffe://example.org"
    return {
        "server": authority.sign("server"),
        "listed": authority.sign("listed", "DNS:dns.example", f"{spiffe}/listed"),
        "other": authority.sign("other", f"{spiffe}/other"),
        "barred": authority.sign("barred", f"{spiffe}/barred"),
        "by dns": authority.sign("by-dns", "DNS:first.example", "DNS:second.example"),
        "nameless": authority.sign("nameless", "email:a@example.org"),
        "endless": authority.sign("endless", f"{spiffe}/{'x' * 300}"),
    }


@pytest.fixture
def list_path(tmp_path: Path) -> Path:
    """Return the path of a file with the list."""
    path = tmp_path / "callers"
    path.write_text(_LIST)
    return path


@asynccontextmanager
async def _identifying_server(
    identify: Authenticator,
    server_certificate: SignedCertificate | None,
    client_certificate: SignedCertificate | None,
) -> AsyncIterator[WhoAmI]:
    """Start a server that returns the caller it identified, or the error. TLS needs both certificates."""

    async def identify_caller(_: bytes, context: Context) -> bytes:
        try:
            caller = identify(context)
        except ProxyError as error:
            return f"{type(error).__name__}: {error}".encode()
        return f"{caller.name} {caller.priority}".encode()

    server = aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(identify_caller)
    server.add_registered_method_handlers("Who", {"Am": handler})
    if server_certificate is None:
        port = server.add_insecure_port("127.0.0.1:0")
        channel = aio.insecure_channel(f"127.0.0.1:{port}")
    else:
        files = PemFiles(
            ca=str(server_certificate.ca),
            cert=str(server_certificate.certificate),
            key=str(server_certificate.key),
        )
        port = server.add_secure_port("127.0.0.1:0", server_credentials(files.watch()))
        assert client_certificate
        channel = aio.secure_channel(
            f"127.0.0.1:{port}", grpc.ssl_channel_credentials(*client_certificate.pem)
        )
    await server.start()
    who_am_i: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Who/Am")
    try:
        async with channel:
            yield lambda *metadata: who_am_i(b"", metadata=metadata, timeout=60)
    finally:
        await server.stop(None)


_CLAIM = ("x-caller", "claimed")
_TOKEN = ("authorization", "Bearer of-pricing")


@pytest.mark.parametrize(
    ("certificate", "metadata", "expected"),
    [
        ("listed", (), "spiffe://example.org/listed interactive"),
        ("listed", (_CLAIM, ("x-priority", "bulk")), "spiffe://example.org/listed bulk"),
        ("by dns", (_CLAIM,), "first.example interactive"),
        ("nameless", (_CLAIM,), "claimed interactive"),
        ("nameless", (), "anonymous interactive"),
        ("endless", (), "anonymous interactive"),
        ("listed", (("x-priority", "x"),), "InvalidRequestError"),
        (None, (_CLAIM, _TOKEN), "claimed interactive"),
        (None, (_TOKEN,), "anonymous interactive"),
    ],
)
async def test_without_a_list_every_caller_is_admitted_and_certificates_name_it(
    certificates: dict[str, SignedCertificate],
    certificate: str | None,
    metadata: tuple[tuple[str, str], ...],
    expected: str,
) -> None:
    """The name is a certificate's first URI, else its first DNS name, else `x-caller`."""
    identify = make_authenticator(use_certificates=certificate is not None, caller_list=None)
    server_certificate, client_certificate = (
        (certificates["server"], certificates[certificate]) if certificate else (None, None)
    )
    async with _identifying_server(identify, server_certificate, client_certificate) as who_am_i:
        assert (await who_am_i(*metadata)).decode().startswith(expected)


@pytest.mark.parametrize(
    ("certificate", "metadata", "expected"),
    [
        (None, (_TOKEN,), "pricing interactive"),
        (None, (_TOKEN, _CLAIM, ("x-priority", "bulk")), "pricing bulk"),
        (None, (("authorization", "bearer  the-next-of-pricing"),), "pricing interactive"),
        (None, (), "UnauthenticatedError: a bearer token is needed"),
        (None, (_CLAIM,), "UnauthenticatedError: a bearer token is needed"),
        (None, (("authorization", "Bearer"),), "UnauthenticatedError: a bearer token is needed"),
        (
            None,
            (("authorization", "Bearer of-unknown"),),
            "UnauthenticatedError: a bearer token is not known",
        ),
        (None, (("authorization", "Basic of-pricing"),), "UnauthenticatedError: a bearer token is not known"),
        (None, (("authorization", "of-pricing"),), "UnauthenticatedError"),
        (None, (("authorization", hashlib.sha256(b"of-pricing").hexdigest()),), "UnauthenticatedError"),
        (None, (("authorization", "Bearer of-gone"),), "PermissionDeniedError: gone may not"),
        (None, (_TOKEN, ("x-priority", "x")), "InvalidRequestError"),
        ("listed", (), "spiffe://example.org/listed interactive"),
        ("listed", (_TOKEN, _CLAIM), "spiffe://example.org/listed interactive"),
        ("other", (), "PermissionDeniedError: spiffe://example.org/other may not"),
        ("other", (_CLAIM,), "PermissionDeniedError"),
        ("other", (("authorization", "Bearer of-unknown"),), "PermissionDeniedError"),
        ("other", (_TOKEN,), "pricing interactive"),
        ("barred", (), "PermissionDeniedError: spiffe://example.org/barred may not"),
        ("barred", (_TOKEN,), "PermissionDeniedError: spiffe://example.org/barred may not"),
        ("by dns", (_TOKEN,), "PermissionDeniedError: first.example may not"),
        ("nameless", (_CLAIM,), "UnauthenticatedError"),
        ("nameless", (_TOKEN,), "pricing interactive"),
    ],
)
async def test_with_a_list_only_listed_callers_are_admitted(
    certificates: dict[str, SignedCertificate],
    list_path: Path,
    certificate: str | None,
    metadata: tuple[tuple[str, str], ...],
    expected: str,
) -> None:
    """Admitted by a listed certificate or else by token. `x-caller` does not count, and `denied` wins."""
    identify = make_authenticator(
        use_certificates=certificate is not None, caller_list=caller_list.watch_caller_list(str(list_path))
    )
    server_certificate, client_certificate = (
        (certificates["server"], certificates[certificate]) if certificate else (None, None)
    )
    async with _identifying_server(identify, server_certificate, client_certificate) as who_am_i:
        assert (await who_am_i(*metadata)).decode().startswith(expected)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("pricing s3cret", "line 2 is not NAME sha256:HEX"),
        ("pricing", "line 2 is not"),
        ("pricing sha256:s3cret", "line 2 is not"),
        (f"pricing sha256:{'A' * 64}", "line 2 is not"),
        (f"pricing md5:{'a' * 64}", "line 2 is not"),
        (f"{'x' * 256} certificate", "line 2 is not"),
        ("pricing certificate s3cret", "line 2 is not"),
        (f"other sha256:{hashlib.sha256(b'of-pricing').hexdigest()}", "line 2 has the token of pricing"),
    ],
)
def test_invalid_line_is_reported_by_number_without_its_text(tmp_path: Path, line: str, why: str) -> None:
    """The line may hold a token that was not hashed."""
    path = tmp_path / "callers"
    path.write_text(f"pricing sha256:{hashlib.sha256(b'of-pricing').hexdigest()}\n{line}\n")
    with pytest.raises(UsageError, match=why) as refused:
        caller_list.watch_caller_list(str(path))
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "# empty\n", "gone denied\n"])
def test_list_without_admitted_callers_is_an_error(tmp_path: Path, text: str) -> None:
    """An empty file is being written or a mistake, and must not lock every caller out."""
    path = tmp_path / "callers"
    path.write_text(text)
    with pytest.raises(UsageError, match="admits no caller"):
        caller_list.watch_caller_list(str(path))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


async def test_changed_list_applies_after_the_next_reload(
    list_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A removed token is unknown, a new one known. An invalid list changes nothing."""
    reloading_list = caller_list.watch_caller_list(str(list_path))
    identify = make_authenticator(use_certificates=False, caller_list=reloading_list)
    async with _identifying_server(identify, None, None) as who_am_i:
        _write(list_path, _LIST.replace("of-pricing", "") + "broken s3cret\n")
        assert reloading_list.reload_if_changed() is ReloadResult.FAILED
        assert await who_am_i(_TOKEN) == b"pricing interactive"
        _write(list_path, f"new sha256:{hashlib.sha256(b'of-new').hexdigest()}\n")
        assert reloading_list.reload_if_changed() is ReloadResult.RELOADED
        assert (await who_am_i(_TOKEN)).startswith(b"UnauthenticatedError")
        assert await who_am_i(("authorization", "Bearer of-new")) == b"new interactive"
    assert "s3cret" not in caplog.text


@pytest.mark.slow
async def test_each_listener_serves_the_renewed_certificate(tmp_path: Path) -> None:
    """Two listeners share the files, and both serve the renewed certificate."""
    old, new = CertificateAuthority(tmp_path, "old"), CertificateAuthority(tmp_path, "new")
    first, second, client = old.sign("a"), new.sign("a"), new.sign("client")
    paths = [tmp_path / name for name in ("ca", "crt", "key")]

    def write_files(files: SignedCertificate) -> None:
        for path, file in zip(paths, (files.ca, files.certificate, files.key), strict=True):
            path.write_bytes(file.read_bytes())

    write_files(first)
    pem = PemFiles(ca=str(paths[0]), cert=str(paths[1]), key=str(paths[2])).watch()
    server = aio.server()
    ports = [server.add_secure_port("127.0.0.1:0", server_credentials(pem)) for _ in range(2)]
    await server.start()

    async def is_refused(port: int, client_certificate: SignedCertificate) -> bool:
        credentials = grpc.ssl_channel_credentials(*client_certificate.pem)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            who_am_i: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Who/Am")
            with pytest.raises(aio.AioRpcError) as ended:
                await who_am_i(b"", timeout=60)
            return ended.value.code() is grpc.StatusCode.UNAVAILABLE

    try:
        assert [await is_refused(port, client) for port in ports] == [True, True]
        write_files(second)
        assert pem.reload_if_changed() is ReloadResult.RELOADED
        assert [await is_refused(port, client) for port in (*ports, *ports)] == [False] * 4
        assert [await is_refused(port, first) for port in ports] == [True, True]
    finally:
        await server.stop(None)


def test_documented_commands_make_a_token_and_its_line(tmp_path: Path) -> None:
    """The commands of docs/operations.md make a token, and a line of the list that admits it."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    commands = re.search(r"```sh\n(openssl rand .*?)```", page, re.DOTALL)
    assert commands
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands[1]], cwd=tmp_path, check=True)
    token = (tmp_path / "token").read_text().strip()
    assert (
        caller_list.watch_caller_list(str(tmp_path / "callers")).value.name_for_token(token) == "pricing-team"
    )
