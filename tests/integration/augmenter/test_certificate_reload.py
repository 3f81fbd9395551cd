"""Tests of certificates that are renewed while the augmenter runs."""

import threading
from pathlib import Path

import grpc

from tests.integration.augmenter.conftest import RunAugmenter
from tests.support.certificates import (
    CertificateAuthority,
    MountedSecret,
    SignedCertificate,
)
from tests.support.model_server import ReceivedCall, answer_threes, in_sequence, scripted_model
from tests.support.postings import make_posting


def _server(own: SignedCertificate) -> grpc.ServerCertificateConfiguration:
    ca, key, certificate = own.pem
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)


def test_renewed_certificates_are_used_without_restart(augment: RunAugmenter, tmp_path: Path) -> None:
    """When CA, certificate and key are replaced during a run, the next connection uses the new ones.

    The files are replaced between two RPCs, by those of another authority. A connection with the new ones is
    established during the second RPC, and all files are done.
    """
    old = CertificateAuthority(tmp_path, "old")
    new = CertificateAuthority(tmp_path, "new")
    mounted = MountedSecret(tmp_path / "mounted")
    source = tmp_path / "in"
    before = old.sign("server")
    after = new.sign("server")
    mounted.replace_certificate(old.sign("client"))
    renewed = new.sign("client")
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.jsonl").write_bytes(make_posting(name))
    is_swapped = threading.Event()
    is_connected = threading.Event()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        if not is_swapped.is_set():
            return None
        is_connected.set()
        return _server(after)

    def swap(call: ReceivedCall) -> list[tuple[int, int]]:
        mounted.replace_certificate(renewed)
        is_swapped.set()
        return answer_threes(call)

    def wait(call: ReceivedCall) -> list[tuple[int, int]]:
        assert is_connected.wait(60)
        return answer_threes(call)

    credentials = grpc.dynamic_ssl_server_credentials(
        _server(before),
        fetch,  # type: ignore[arg-type]  # None means no change, which the stubs do not know
        require_client_authentication=True,
    )
    with scripted_model(in_sequence(swap, wait), credentials=credentials) as model:
        result = augment(
            source, tmp_path / "out", "--target", model.target, "--concurrency", "1", *mounted.paths.flags()
        )
    assert (result.exit_code, result.stderr) == (0, "")
    assert [call.companies for call in model.calls] == [["a"], ["b"], ["c"]]
