"""The listeners' TLS: each handshake goes by the certificate, key and CA that the files hold by then."""

import grpc

from services.common.file_reload import ReloadingFile
from services.common.tls import PemBundle


def server_credentials(pem: ReloadingFile[PemBundle]) -> grpc.ServerCredentials:
    """For one listener: gRPC keeps what it was given last for each by itself."""
    first = pem.value
    return grpc.dynamic_ssl_server_credentials(
        _certificate_configuration(first),
        _CertificateProvider(pem, first),
        require_client_authentication=first.roots is not None,
    )


class _CertificateProvider:
    """What gRPC asks before each handshake, from threads of its own; None: it is as before.

    State: `_given`. Two handshakes at once may be given the same, which changes nothing.
    """

    def __init__(self, pem: ReloadingFile[PemBundle], given: PemBundle) -> None:
        self._pem = pem
        self._last_served = given

    def __call__(self) -> grpc.ServerCertificateConfiguration:
        value = self._pem.value
        if value is self._last_served:
            return None  # type: ignore[return-value]  # what gRPC documents, and its types forget
        self._last_served = value
        return _certificate_configuration(value)


def _certificate_configuration(pem: PemBundle) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None  # noqa: S101 - the settings let no listener do without
    assert pem.chain is not None  # noqa: S101
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.roots)
