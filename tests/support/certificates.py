"""Certificates for tests, made on the spot."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


def make_self_signed(folder: Path, name: str, *, kind: str = "rsa:2048") -> tuple[Path, Path]:
    """A certificate for this machine that signs itself, and its key; skips where openssl is missing."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    _openssl(
        "req",
        "-x509",
        "-newkey",
        *kind.split(),
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    )
    return certificate, key


@dataclass(frozen=True)
class SignedCertificate:
    """The files of a certificate, its key, and the CA that signed it."""

    certificate: Path
    key: Path
    ca: Path

    def flags(self, prefix: str = "--tls", *, ca: str | None = "ca") -> tuple[str, ...]:
        """`--tls-cert`, `--tls-key` and, by that name, the CA."""
        own = (f"{prefix}-cert", str(self.certificate), f"{prefix}-key", str(self.key))
        return own if ca is None else (*own, f"{prefix}-{ca}", str(self.ca))

    @property
    def pem(self) -> tuple[bytes, bytes, bytes]:
        """CA, key, certificate: what gRPC's credentials of a channel take, in their order."""
        return self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes()


class CertificateAuthority:
    """A CA in a folder of its own; it signs in milliseconds."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self.certificate, self._key = self._folder / "ca.crt", self._folder / "ca.key"
        _openssl(
            "req",
            "-x509",
            *_EC_KEY_ARGS,
            "-keyout",
            str(self._key),
            "-out",
            str(self.certificate),
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
        )

    def sign(self, name: str, *names: str) -> SignedCertificate:
        """A certificate with these subject alternative names (`DNS:…`, `URI:…`), or of this machine."""
        key, certificate = self._folder / f"{name}.key", self._folder / f"{name}.crt"
        alternatives = ",".join(names) or "IP:127.0.0.1,DNS:localhost"
        _openssl(
            "req",
            "-x509",
            *_EC_KEY_ARGS,
            "-CA",
            str(self.certificate),
            "-CAkey",
            str(self._key),
            "-keyout",
            str(key),
            "-out",
            str(certificate),
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-addext",
            f"subjectAltName={alternatives}",
            "-addext",
            "basicConstraints=CA:FALSE",
        )
        return SignedCertificate(certificate, key, self.certificate)


class MountedSecret:
    """A folder as Kubernetes mounts a Secret: links that lead to another folder after each change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0
        folder.mkdir()

    def replace_files(self, **files: bytes | Path) -> None:
        """Have it hold these files, all at once; a dot in a name is written `_`."""
        self._version += 1
        whole = self.folder / f"..{self._version}"
        whole.mkdir()
        for name, content in files.items():
            file = name.replace("_", ".")
            (whole / file).touch(0o600)
            (whole / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            if not (self.folder / file).is_symlink():
                (self.folder / file).symlink_to(Path("..data") / file)
        (self.folder / "..tmp").symlink_to(whole.name)
        (self.folder / "..tmp").replace(self.folder / "..data")

    def replace_certificate(self, signed: SignedCertificate) -> None:
        """As a Secret of the kind `kubernetes.io/tls` has it, with the CA beside."""
        self.replace_files(tls_crt=signed.certificate, tls_key=signed.key, ca_crt=signed.ca)

    @property
    def paths(self) -> SignedCertificate:
        """The paths under which they stay."""
        return SignedCertificate(self.folder / "tls.crt", self.folder / "tls.key", self.folder / "ca.crt")


_EC_KEY_ARGS = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*args: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl is installed")
    subprocess.run(["openssl", *args], check=True, capture_output=True)
