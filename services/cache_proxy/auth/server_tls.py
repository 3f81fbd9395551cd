"""The listeners' TLS: each handshake goes by the certificate, key and CA that the files hold by then."""

import grpc

from services.common.file_reload import Renewed
from services.common.tls import Pem


def server_credentials(pem: Renewed[Pem]) -> grpc.ServerCredentials:
    """For one listener: gRPC keeps what it was given last for each by itself."""
    first = pem.value
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first), _Fetch(pem, first), require_client_authentication=first.roots is not None
    )


class _Fetch:
    """What gRPC asks before each handshake, from threads of its own; None: it is as before.

    State: `_given`. Two handshakes at once may be given the same, which changes nothing.
    """

    def __init__(self, pem: Renewed[Pem], given: Pem) -> None:
        self._pem = pem
        self._given = given

    def __call__(self) -> grpc.ServerCertificateConfiguration:
        value = self._pem.value
        if value is self._given:
            return None  # type: ignore[return-value]  # what gRPC documents, and its types forget
        self._given = value
        return _configuration(value)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None  # noqa: S101 - the settings let no listener do without
    assert pem.chain is not None  # noqa: S101
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.roots)
