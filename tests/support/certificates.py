"""Certificates that tests create with openssl."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_EC_KEY_ARGS = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_self_signed(folder: Path, name: str, *, kind: str = "rsa:2048") -> tuple[Path, Path]:
    """Create a self-signed certificate for 127.0.0.1 and return the paths of the certificate and its key.

    Skip the test if openssl is not installed.
    """
    key = folder / f"{name}.key"
    certificate = folder / f"{name}.crt"
    _openssl(
        *("req", "-x509", "-newkey", *kind.split(), "-nodes"),
        *("-keyout", str(key), "-out", str(certificate), "-days", "2"),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
    )
    return certificate, key


@dataclass(frozen=True)
class SignedCertificate:
    """The paths of a certificate, its key, and the certificate of the authority that signed it."""

    certificate: Path
    key: Path
    ca: Path

    def flags(self, prefix: str = "--tls", *, ca: str | None = "ca") -> tuple[str, ...]:
        """Return the flags `--tls-cert`, `--tls-key` and `--tls-ca`.

        `ca` is the last part of the third flag's name. None leaves that flag out.
        """
        own = (f"{prefix}-cert", str(self.certificate), f"{prefix}-key", str(self.key))
        return own if ca is None else (*own, f"{prefix}-{ca}", str(self.ca))

    @property
    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Return CA, key and certificate in PEM, in the order that gRPC's channel credentials take."""
        return self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes()


class CertificateAuthority:
    """A certificate authority in its own folder. It signs in milliseconds, since its keys are elliptic."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self.certificate = self._folder / "ca.crt"
        self._key = self._folder / "ca.key"
        _openssl(
            *("req", "-x509", *_EC_KEY_ARGS),
            *("-keyout", str(self._key), "-out", str(self.certificate), "-days", "2"),
            *("-subj", f"/CN={name}"),
        )

    def sign(self, name: str, *names: str) -> SignedCertificate:
        """Create a certificate with these subject alternative names (`DNS:…`, `URI:…`).

        Without names it is for 127.0.0.1 and localhost.
        """
        key = self._folder / f"{name}.key"
        certificate = self._folder / f"{name}.crt"
        alternatives = ",".join(names) or "IP:127.0.0.1,DNS:localhost"
        _openssl(
            *("req", "-x509", *_EC_KEY_ARGS, "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={alternatives}", "-addext", "basicConstraints=CA:FALSE"),
        )
        return SignedCertificate(certificate, key, self.certificate)


class MountedSecret:
    """A folder laid out as Kubernetes mounts a Secret: all files change at once through one symbolic link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0
        folder.mkdir()

    def replace_files(self, **files: bytes | Path) -> None:
        """Replace the content of the folder atomically. In a file's name `_` stands for a dot."""
        self._version += 1
        version_folder = self.folder / f"..{self._version}"
        version_folder.mkdir()
        for name, content in files.items():
            file = name.replace("_", ".")
            (version_folder / file).touch(0o600)
            (version_folder / file).write_bytes(
                content if isinstance(content, bytes) else content.read_bytes()
            )
            if not (self.folder / file).is_symlink():
                (self.folder / file).symlink_to(Path("..data") / file)
        (self.folder / "..tmp").symlink_to(version_folder.name)
        (self.folder / "..tmp").replace(self.folder / "..data")

    def replace_certificate(self, signed: SignedCertificate) -> None:
        """Replace the content as a Secret of type `kubernetes.io/tls` would, with the CA beside it."""
        self.replace_files(tls_crt=signed.certificate, tls_key=signed.key, ca_crt=signed.ca)

    @property
    def paths(self) -> SignedCertificate:
        """Return the paths of the files, which stay the same when their content is replaced."""
        return SignedCertificate(self.folder / "tls.crt", self.folder / "tls.key", self.folder / "ca.crt")


def _openssl(*args: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl is installed")
    subprocess.run(["openssl", *args], check=True, capture_output=True)
