"""Settings of certificates and tokens, of callers and towards the model."""

from dataclasses import dataclass

from services.common import bearer, options
from services.common.errors import UsageError
from services.common.options import flag
from services.common.tls import PemFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerAuthSettings:
    """How callers connect and authenticate."""

    tls_cert: str | None = flag(
        "--tls-cert", options.TEXT, text="certificate shown to callers; Unix sockets stay in the clear"
    )
    tls_key: str | None = flag("--tls-key", options.TEXT, text="its key")
    tls_client_ca: str | None = flag(
        "--tls-client-ca", options.TEXT, text="CA that must have signed callers' certificates (mutual TLS)"
    )
    caller_tokens_file: str | None = flag(
        "--caller-tokens-file",
        options.TEXT,
        text="who may call; a line each: NAME sha256:HEX (of a bearer token), NAME certificate, NAME denied",
    )

    def __post_init__(self) -> None:
        """Reject a certificate without its key, and client certificates without TLS."""
        self.pem_files.validate_pair()
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise UsageError("--tls-client-ca needs --tls-cert: without it nothing is encrypted")

    @property
    def pem_files(self) -> PemFiles:
        """Return the certificate files of the listeners."""
        return PemFiles(
            ca=self.tls_client_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            flags=("--tls-client-ca", "--tls-cert", "--tls-key"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAuthSettings:
    """How the proxy authenticates to the model."""

    model_token_file: str | None = flag(
        "--model-token-file", options.TEXT, text="file with the bearer token for the model; it may change"
    )
    model_tls_ca: str | None = flag(
        "--model-tls-ca", options.TEXT, text="CA that signed the model's certificate; the way is encrypted"
    )
    model_tls_cert: str | None = flag(
        "--model-tls-cert", options.TEXT, text="the proxy's own certificate, for mutual TLS with the model"
    )
    model_tls_key: str | None = flag("--model-tls-key", options.TEXT, text="its key")

    def __post_init__(self) -> None:
        """Reject an incomplete set of certificate files."""
        self.pem_files.validate()

    def require_encrypted(self, target: str) -> None:
        """Reject a token that would be sent without TLS to another machine. Raises `UsageError`."""
        bearer.require_encrypted(
            target, token_file=self.model_token_file, tls_ca=self.model_tls_ca, prefix="--model-"
        )

    @property
    def pem_files(self) -> PemFiles:
        """Return the certificate files of the connection to the model."""
        return PemFiles(
            ca=self.model_tls_ca,
            cert=self.model_tls_cert,
            key=self.model_tls_key,
            flags=("--model-tls-ca", "--model-tls-cert", "--model-tls-key"),
        )
