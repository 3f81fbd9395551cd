"""Reads what the settings name of certificates and tokens, and has it looked after."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from services.cache_proxy.auth import caller_list
from services.cache_proxy.auth.authenticator import make_authenticator
from services.cache_proxy.auth.caller import Authenticator
from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.auth.server_tls import server_credentials
from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.common.bearer import Token
from services.common.file_reload import ReloadingFile
from services.common.grpc_target import is_local_target
from services.common.tls import PemBundle

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallerAuth:
    """How they are told apart, and what each listener shows them; None: nothing, in the clear."""

    authenticate: Authenticator
    credentials: Callable[[], grpc.ServerCredentials] | None


def load_caller_auth(
    access: CallerAuthSettings,
    renewals: FileReloader,
    *,
    listen: Sequence[str],
    plaintext: Sequence[str] = (),
) -> CallerAuth:
    """Read what is set. `plaintext` are the addresses that have no TLS in any case. Raises UsageError."""
    listed = credentials = None
    if access.tls_cert is not None:
        pem = access.pem_files.watch(on_reload=renewals.on_reload("listen_tls"))
        renewals.add(pem.reload_if_changed)
        credentials = partial(server_credentials, pem)
    if access.caller_tokens_file is not None:
        listed = caller_list.watch_caller_list(
            access.caller_tokens_file, on_reload=renewals.on_reload("caller_tokens")
        )
        renewals.add(listed.reload_if_changed)
    _warn_about_plaintext(access, (*plaintext, *(listen if credentials is None else ())))
    identify = make_authenticator(use_certificates=access.tls_client_ca is not None, caller_list=listed)
    return CallerAuth(identify, credentials)


def _warn_about_plaintext(access: CallerAuthSettings, plaintext: Sequence[str]) -> None:
    """Warn where others than this machine reach addresses without TLS, and that matters."""
    for address in plaintext:
        if is_local_target(address):
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
class ModelCredentials:
    """How the model is reached; None: in the clear, without a token."""

    tls: ReloadingFile[PemBundle] | None = None
    token: Token | None = None


PLAINTEXT = ModelCredentials()


def load_model_credentials(access: ModelAuthSettings, renewals: FileReloader) -> ModelCredentials:
    """Whoever is given it looks after it. Raises UsageError."""
    tls = token = None
    if access.model_tls_ca is not None:
        tls = access.pem_files.watch(on_reload=renewals.on_reload("model_tls"))
    if access.model_token_file is not None:
        token = Token(
            access.model_token_file,
            flag_name="--model-token-file",
            on_reload=renewals.on_reload("model_token"),
        )
    return ModelCredentials(tls, token)
