"""All settings of `serve`. They are immutable and validated once.

Only the modules of this package read flags and environment variables.
"""

from dataclasses import dataclass, field

from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.config.model_settings import ModelSettings
from services.cache_proxy.config.server_settings import ServerSettings
from services.common.errors import UsageError

ENV_PREFIX = "CACHE_PROXY"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings of `serve`."""

    server: ServerSettings
    model: ModelSettings
    cache: CacheSettings
    key: KeySettings
    answers: AnswerSettings
    caller_auth: CallerAuthSettings = field(default_factory=CallerAuthSettings)
    model_auth: ModelAuthSettings = field(default_factory=ModelAuthSettings)

    def __post_init__(self) -> None:
        """Reject equal model versions, and a token that would be sent in plain text to another machine."""
        self.model_auth.require_encrypted(self.model.model_target)
        if self.answers.previous_model_version == self.key.model_version:
            raise UsageError("--previous-model-version must not be --model-version")
