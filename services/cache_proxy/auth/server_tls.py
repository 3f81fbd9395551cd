"""TLS of the gRPC listeners: each handshake uses the certificate, key and CA that the files hold by then."""

import grpc

from services.common.file_reload import ReloadingFile
from services.common.tls import PemBundle


def server_credentials(pem: ReloadingFile[PemBundle]) -> grpc.ServerCredentials:
    """Return credentials for one listener. gRPC keeps the last configuration of each listener separately."""
    first = pem.value
    return grpc.dynamic_ssl_server_credentials(
        _certificate_configuration(first),
        _CertificateProvider(pem, first),
        require_client_authentication=first.roots is not None,
    )


class _CertificateProvider:
    """Callback that gRPC calls before each handshake, from its threads. None means that nothing has changed.

    State: `_last_served`. Two handshakes at once may both get the new configuration, which is harmless.
    """

    def __init__(self, pem: ReloadingFile[PemBundle], last_served: PemBundle) -> None:
        self._pem = pem
        self._last_served = last_served

    def __call__(self) -> grpc.ServerCertificateConfiguration:
        value = self._pem.value
        if value is self._last_served:
            # gRPC documents None for "no change", but its type stubs do not allow it.
            return None  # type: ignore[return-value]
        self._last_served = value
        return _certificate_configuration(value)


def _certificate_configuration(pem: PemBundle) -> grpc.ServerCertificateConfiguration:
    # The settings require a certificate and a key wherever a listener has TLS.
    assert pem.key is not None  # noqa: S101
    assert pem.chain is not None  # noqa: S101
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.roots)
