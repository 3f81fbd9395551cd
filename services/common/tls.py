"""Load TLS files in PEM and validate them, because gRPC does not report what is wrong with them."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from services.common.errors import UsageError
from services.common.file_reload import ReloadingFile, ReloadResult, read_file
from services.common.redaction import warn_if_world_readable

# rsaEncryption, P-256, P-384, P-521, in DER. With other keys gRPC reports nothing, but every handshake fails.
_SUPPORTED_KEY_OIDS = tuple(
    map(bytes.fromhex, ("06092a864886f70d010101", "06082a8648ce3d030107", "06052b81040022", "06052b81040023"))
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PemBundle:
    """Trusted CAs (`roots`), and the own certificate (`chain`) with its `key`. Each may be None."""

    roots: bytes | None
    chain: bytes | None
    key: bytes | None

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials of a client."""
        return grpc.ssl_channel_credentials(self.roots, self.key, self.chain)


@dataclass(frozen=True, kw_only=True, slots=True)
class PemFiles:
    """Paths of CA, certificate and key. `flags` are the flags that name them, in this order."""

    ca: str | None
    cert: str | None
    key: str | None
    flags: tuple[str, str, str] = ("--tls-ca", "--tls-cert", "--tls-key")

    def validate_pair(self) -> None:
        """Raise UsageError for a certificate without its key or a key without its certificate."""
        _, cert_flag, key_flag = self.flags
        if (self.cert is None) is not (self.key is None):
            message = f"{cert_flag} and {key_flag}: neither goes without the other"
            raise UsageError(message)

    def validate(self) -> None:
        """Raise UsageError also for a client certificate without a CA, since nothing would be encrypted."""
        self.validate_pair()
        ca_flag, cert_flag, _ = self.flags
        if self.cert is not None and self.ca is None:
            message = f"{cert_flag} needs {ca_flag}: without it nothing is encrypted"
            raise UsageError(message)

    def watch(
        self, *, on_reload: Callable[[ReloadResult], None] = lambda _: None
    ) -> ReloadingFile[PemBundle]:
        """Return the files' content, which is reloaded when they change. Raises UsageError."""
        paths = [path for path in (self.ca, self.cert, self.key) if path is not None]
        return ReloadingFile(paths, self._read, on_reload=on_reload)

    def _read(self) -> PemBundle:
        ca_flag, cert_flag, key_flag = self.flags
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        roots = chain = private = None
        if self.ca is not None:
            roots = read_file(self.ca, flag_name=ca_flag)
            try:
                context.load_verify_locations(self.ca)
            except (OSError, ValueError) as error:
                message = f"{ca_flag} {self.ca}: holds no certificate in PEM"
                raise UsageError(message) from error
        if self.cert is not None and self.key is not None:
            chain = read_file(self.cert, flag_name=cert_flag)
            private = read_file(self.key, flag_name=key_flag)
            try:
                # Without a password callback OpenSSL would prompt on the terminal.
                context.load_cert_chain(self.cert, self.key, password=lambda: b"")
            except (OSError, ValueError) as error:
                message = (
                    f"{cert_flag} {self.cert} and {key_flag} {self.key}: "
                    "not in PEM, not a pair, or behind a passphrase"
                )
                raise UsageError(message) from error
            if not _is_supported_key(chain):
                message = f"{cert_flag} {self.cert}: gRPC knows RSA and ECDSA (P-256, P-384, P-521) only"
                raise UsageError(message)
            warn_if_world_readable(Path(self.key), flag_name=key_flag)
        return PemBundle(roots=roots, chain=chain, key=private)


def _is_supported_key(chain: bytes) -> bool:
    """Return whether gRPC supports the key of the first certificate; true if that cannot be decided."""
    first, end, _ = chain.decode(errors="replace").partition(ssl.PEM_FOOTER)
    try:
        der = ssl.PEM_cert_to_DER_cert(ssl.PEM_HEADER + first.rpartition(ssl.PEM_HEADER)[2] + end)
    except ValueError:
        # OpenSSL also accepts other headers than the usual one.
        return True
    return any(kind in der for kind in _SUPPORTED_KEY_OIDS)
