"""Read the certificates and the token by which the proxy authenticates to the model."""

from dataclasses import dataclass

from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.config.auth_settings import ModelAuthSettings
from services.common.bearer import Token
from services.common.file_reload import ReloadingFile
from services.common.tls import PemBundle


@dataclass(frozen=True, slots=True)
class ModelCredentials:
    """TLS and the bearer token towards the model; None means plaintext, and no token."""

    tls: ReloadingFile[PemBundle] | None = None
    token: Token | None = None


PLAINTEXT = ModelCredentials()


def load_model_credentials(settings: ModelAuthSettings, reloader: FileReloader) -> ModelCredentials:
    """Read the files that the settings name. Raise UsageError if one cannot be used.

    The caller has to check them for changes.
    """
    tls = token = None
    if settings.model_tls_ca is not None:
        tls = settings.pem_files.watch(on_reload=reloader.on_reload("model_tls"))
    if settings.model_token_file is not None:
        token = Token(
            settings.model_token_file,
            flag_name="--model-token-file",
            on_reload=reloader.on_reload("model_token"),
        )
    return ModelCredentials(tls, token)
