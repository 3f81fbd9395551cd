"""Reads what the settings name of certificates and tokens, and has it looked after."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from services.cache_proxy.auth import caller_list
from services.cache_proxy.auth.authenticator import identification
from services.cache_proxy.auth.caller import Identify
from services.cache_proxy.auth.reloader import Renewals
from services.cache_proxy.auth.server_tls import server_credentials
from services.cache_proxy.config.auth_settings import CallerAccess, ModelAccess
from services.common.bearer import Token
from services.common.file_reload import Renewed
from services.common.grpc_target import is_on_this_machine
from services.common.tls import Pem

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Callers:
    """How they are told apart, and what each listener shows them; None: nothing, in the clear."""

    identify: Identify
    credentials: Callable[[], grpc.ServerCredentials] | None


def open_callers(
    access: CallerAccess, renewals: Renewals, *, listen: Sequence[str], plaintext: Sequence[str] = ()
) -> Callers:
    """Read what is set. `plaintext` are the addresses that have no TLS in any case. Raises UsageError."""
    listed = credentials = None
    if access.tls_cert is not None:
        pem = access.files.follow(tell=renewals.teller("listen_tls"))
        renewals.add(pem.look)
        credentials = partial(server_credentials, pem)
    if access.caller_tokens_file is not None:
        listed = caller_list.follow(access.caller_tokens_file, tell=renewals.teller("caller_tokens"))
        renewals.add(listed.look)
    _warn_of_plaintext(access, (*plaintext, *(listen if credentials is None else ())))
    identify = identification(certificates=access.tls_client_ca is not None, listed=listed)
    return Callers(identify, credentials)


def _warn_of_plaintext(access: CallerAccess, plaintext: Sequence[str]) -> None:
    """Warn where others than this machine reach addresses without TLS, and that matters."""
    for address in plaintext:
        if is_on_this_machine(address):
            continue
        if access.caller_tokens_file is not None:
            _log.warning(
                "bearer tokens are received without TLS on %s; set --tls-cert, or terminate TLS in front of "
                "the proxy",
                address,
            )
        elif access.tls_client_ca is not None:
            _log.warning(
                "callers need no certificate on %s; use a loopback address, or set --caller-tokens-file",
                address,
            )


@dataclass(frozen=True, slots=True)
class ModelWay:
    """How the model is reached; None: in the clear, without a token."""

    tls: Renewed[Pem] | None = None
    token: Token | None = None


IN_THE_CLEAR = ModelWay()


def open_way(access: ModelAccess, renewals: Renewals) -> ModelWay:
    """Whoever is given it looks after it. Raises UsageError."""
    tls = token = None
    if access.model_tls_ca is not None:
        tls = access.files.follow(tell=renewals.teller("model_tls"))
    if access.model_token_file is not None:
        token = Token(
            access.model_token_file, flag_name="--model-token-file", tell=renewals.teller("model_token")
        )
    return ModelWay(tls, token)
