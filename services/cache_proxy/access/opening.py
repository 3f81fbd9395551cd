"""Reads what the settings name of certificates and tokens, and has it looked after."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from services.cache_proxy.access import callers_file
from services.cache_proxy.access.identify import identification
from services.cache_proxy.access.listeners import server_credentials
from services.cache_proxy.access.renewals import Renewals
from services.cache_proxy.access.settings import CallerAccess, ModelAccess
from services.cache_proxy.callers import Identify
from services.common.bearer import Token
from services.common.renewal import Renewed
from services.common.targets import is_on_this_machine
from services.common.tls import Pem

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Callers:
    """How they are told apart, and what each listener shows them; None: nothing, in the clear."""

    identify: Identify
    credentials: Callable[[], grpc.ServerCredentials] | None


def open_callers(access: CallerAccess, renewals: Renewals, *, listen: Sequence[str]) -> Callers:
    """Raises UsageError."""
    listed = credentials = None
    if access.tls_cert is not None:
        pem = access.files.follow(tell=renewals.teller("listen_tls"))
        renewals.add(pem.look)
        credentials = partial(server_credentials, pem)
    if access.caller_tokens_file is not None:
        listed = callers_file.follow(access.caller_tokens_file, tell=renewals.teller("caller_tokens"))
        renewals.add(listed.look)
        if credentials is None and not all(map(is_on_this_machine, listen)):
            _log.warning("without --tls-cert, callers' tokens come in the clear: see that something encrypts")
    identify = identification(certificates=access.tls_client_ca is not None, listed=listed)
    return Callers(identify, credentials)


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
