"""Files that are read again when they change, and are believed only when they are whole."""

import logging
import os
from pathlib import Path

import pytest

from services.common.errors import UsageError
from services.common.file_reload import MAX_FILE_BYTES, ReloadingFile, ReloadResult, read_file
from services.common.tls import PemBundle, PemFiles
from tests.support.certificates import CertificateAuthority, MountedSecret, make_self_signed


@pytest.fixture(scope="module")
def mounted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[MountedSecret, CertificateAuthority, CertificateAuthority]:
    """A mounted Secret, and two CAs."""
    folder = tmp_path_factory.mktemp("renewal")
    return (
        MountedSecret(folder / "mounted"),
        CertificateAuthority(folder, "one"),
        CertificateAuthority(folder, "two"),
    )


def _watch(mounted: MountedSecret, results: list[ReloadResult]) -> ReloadingFile[PemBundle]:
    files = mounted.paths
    paths = PemFiles(ca=str(files.ca), cert=str(files.certificate), key=str(files.key))
    return paths.watch(on_reload=results.append)


def test_swapped_secret_is_reloaded(
    mounted: tuple[MountedSecret, CertificateAuthority, CertificateAuthority],
) -> None:
    """Another pair by another CA, swapped as Kubernetes does: there at the next look, once."""
    place, one, two = mounted
    place.replace_certificate(one.sign("a"))
    results: list[ReloadResult] = []
    renewed = _watch(place, results)
    assert renewed.reload_if_changed() is ReloadResult.UNCHANGED
    second = two.sign("b")
    place.replace_certificate(second)
    assert [renewed.reload_if_changed(), renewed.reload_if_changed()] == [
        ReloadResult.RELOADED,
        ReloadResult.UNCHANGED,
    ]
    assert (renewed.value.roots, renewed.value.key, renewed.value.chain) == second.pem
    assert results == [ReloadResult.RELOADED]


def test_mismatched_key_pair_keeps_value_and_is_reported_once(
    mounted: tuple[MountedSecret, CertificateAuthority, CertificateAuthority],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A key of another certificate, a cut file, no file: the last whole pair stays, with one warning each."""
    place, one, _ = mounted
    good, other = one.sign("a"), one.sign("b")
    place.replace_certificate(good)
    results: list[ReloadResult] = []
    renewed = _watch(place, results)
    cut = good.certificate.read_bytes()[:300]
    for broken in (
        {"tls_crt": good.certificate, "tls_key": other.key, "ca_crt": good.ca},
        {"tls_crt": cut, "tls_key": good.key, "ca_crt": good.ca},
        {"tls_crt": good.certificate, "tls_key": good.key, "ca_crt": b""},
        {"tls_crt": good.certificate, "ca_crt": good.ca},
    ):
        place.replace_files(**broken)
        assert [renewed.reload_if_changed(), renewed.reload_if_changed()] == [
            ReloadResult.FAILED,
            ReloadResult.UNCHANGED,
        ]
        assert (renewed.value.roots, renewed.value.key, renewed.value.chain) == good.pem
    place.replace_certificate(good)
    assert renewed.reload_if_changed() is ReloadResult.RELOADED
    assert results == [ReloadResult.FAILED] * 4 + [ReloadResult.RELOADED]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 4
    assert "not a pair" in warned[0]
    assert "PRIVATE KEY" not in caplog.text


@pytest.mark.parametrize("kind", ["ed25519", "ec -pkeyopt ec_paramgen_curve:secp256k1"])
def test_unsupported_key_keeps_value(
    mounted: tuple[MountedSecret, CertificateAuthority, CertificateAuthority], tmp_path: Path, kind: str
) -> None:
    """OpenSSL accepts such a pair, but every handshake of gRPC with it fails, so it is rejected."""
    place, one, _ = mounted
    good = one.sign("a")
    place.replace_certificate(good)
    results: list[ReloadResult] = []
    renewed = _watch(place, results)
    certificate, key = make_self_signed(tmp_path, "odd", kind=kind)
    place.replace_files(tls_crt=certificate, tls_key=key, ca_crt=good.ca)
    assert renewed.reload_if_changed() is ReloadResult.FAILED
    assert (renewed.value.roots, renewed.value.key, renewed.value.chain) == good.pem
    with pytest.raises(UsageError, match=r"--tls-cert .*: gRPC knows RSA and ECDSA \(P-256, P-384, P-521\)"):
        _watch(place, results)


def test_file_changed_during_read_is_read_again(tmp_path: Path) -> None:
    """A file that is replaced in the middle of a look is not believed: the next look has it whole."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    meanwhile: list[bytes] = []

    def read() -> bytes:
        content = read_file(str(path), flag_name="--x")
        if meanwhile:
            path.write_bytes(meanwhile.pop())
        return content

    renewed = ReloadingFile([str(path)], read)
    path.write_bytes(b"four")
    meanwhile.append(b"seven")
    assert (renewed.reload_if_changed(), renewed.value) == (ReloadResult.UNCHANGED, b"one")
    assert (renewed.reload_if_changed(), renewed.value) == (ReloadResult.RELOADED, b"seven")


def test_unreadable_file_at_start_is_usage_error(tmp_path: Path) -> None:
    """There is no last one to go on with; and no file may take all memory."""
    with pytest.raises(UsageError, match=r"--x .*gone: No such file"):
        ReloadingFile([str(tmp_path / "gone")], lambda: read_file(str(tmp_path / "gone"), flag_name="--x"))
    (tmp_path / "large").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(UsageError, match="more than 4 MiB"):
        read_file(str(tmp_path / "large"), flag_name="--x")


def test_fifo_instead_of_file_does_not_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody writes to it: a look that waited would hold the loop for ever."""
    path = tmp_path / "token"
    path.write_bytes(b"one")
    renewed = ReloadingFile([str(path)], lambda: read_file(str(path), flag_name="--x"))
    path.unlink()
    os.mkfifo(path)
    assert (renewed.reload_if_changed(), renewed.reload_if_changed(), renewed.value) == (
        ReloadResult.FAILED,
        ReloadResult.UNCHANGED,
        b"one",
    )
    assert "--x" in caplog.text
    with pytest.raises(UsageError, match="not a file"):
        read_file("/dev/zero", flag_name="--x")
