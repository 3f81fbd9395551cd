"""A channel whose certificate is renewed while calls are under way."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from services.common.reloading_channel import ReloadingChannel
from services.common.tls import PemFiles
from tests.support.certificates import CertificateAuthority, MountedSecret, SignedCertificate

_METHOD = "/Who/Am"


class _IdentityServer:
    """Answers who calls, by the certificate; a call that says `wait` is `held` until `opened`."""

    def __init__(self) -> None:
        self.held, self.opened = threading.Event(), threading.Event()
        self.target = ""

    def answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """The caller's DNS name."""
        if request == b"wait":
            self.held.set()
            self.opened.wait(60)
        return bytes(context.auth_context()["peer_dns"][0])


@contextmanager
def _identity_server(own: SignedCertificate, *, clients: SignedCertificate) -> Iterator[_IdentityServer]:
    running = _IdentityServer()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(running.answer)
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_registered_method_handlers("Who", {"Am": handler})
    credentials = grpc.ssl_server_credentials(
        [(own.key.read_bytes(), own.certificate.read_bytes())],
        root_certificates=clients.ca.read_bytes(),
        require_client_auth=True,
    )
    running.target = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    try:
        yield running
    finally:
        running.opened.set()
        server.stop(grace=None).wait()


@pytest.mark.slow
async def test_renewed_certificate_is_used_for_new_calls(tmp_path: Path) -> None:
    """New calls are made with it, the one under way ends well; a renewal that is broken changes nothing."""
    authority, mounted = CertificateAuthority(tmp_path), MountedSecret(tmp_path / "mounted")
    first, second = authority.sign("first", "DNS:first"), authority.sign("second", "DNS:second")
    mounted.replace_certificate(first)
    files = mounted.paths
    tls = PemFiles(ca=str(files.ca), cert=str(files.certificate), key=str(files.key)).watch()
    with _identity_server(authority.sign("server"), clients=first) as running:
        async with ReloadingChannel(running.target, tls=tls, options=(), max_call_seconds=60) as channel:

            async def who(request: bytes = b"") -> bytes:
                channel.refresh()
                ask: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.current.unary_unary(_METHOD)
                return await ask(request, timeout=60)

            under_way = asyncio.create_task(who(b"wait"))
            assert await asyncio.to_thread(running.held.wait, 60)
            mounted.replace_files(tls_crt=second.certificate, tls_key=first.key, ca_crt=first.ca)
            assert await who() == b"first"
            mounted.replace_certificate(second)
            async with asyncio.timeout(60):
                while await who() != b"second":
                    pass
            assert not under_way.done()
            running.opened.set()
            assert await under_way == b"first"


async def test_close_also_closes_replaced_channels(tmp_path: Path) -> None:
    """While a renewed certificate leads nowhere yet, closing neither waits for it nor leaves a task."""
    authority, mounted = CertificateAuthority(tmp_path), MountedSecret(tmp_path / "mounted")
    mounted.replace_certificate(authority.sign("first"))
    files = mounted.paths
    tls = PemFiles(ca=str(files.ca), cert=str(files.certificate), key=str(files.key)).watch()
    async with ReloadingChannel("127.0.0.1:1", tls=tls, options=(), max_call_seconds=60) as channel:
        mounted.replace_certificate(authority.sign("second"))
        channel.refresh()
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert others
    assert all(task.done() for task in others)
