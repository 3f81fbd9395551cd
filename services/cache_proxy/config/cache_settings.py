"""Settings of the cache: how keys are made, how Redis is reached, and which answers are served."""

from dataclasses import dataclass
from urllib.parse import quote

from services.cache_proxy.config import cache_url
from services.cache_proxy.domain import DAY_SECONDS, NORMAL_FORM_VERSION
from services.common import options
from services.common.errors import UsageError
from services.common.options import flag

DEFAULT_EMBEDDED_DIR = ".cache-proxy"
NORMAL_FORMS = ("fold", "exact")
_MAX_TTL_DAYS = 3_650


@dataclass(frozen=True, kw_only=True, slots=True)
class KeySettings:
    """What determines the keys of answers. All replicas and commands of a deployment must have the same."""

    key_prefix: str = flag(
        "--key-prefix", options.TEXT, "seniority", text="begins the deployment's keys in Redis"
    )
    key_secret_file: str | None = flag(
        "--key-secret-file", options.TEXT, text="file whose content keys the hash of every pair"
    )
    model_version: str = flag("--model-version", options.TEXT, "1", text="namespace of the cached answers")
    normalize: str = flag(
        "--normalize",
        options.choice(*NORMAL_FORMS),
        "fold",
        text="which spellings share an answer: fold ignores case, width and white space",
    )

    def __post_init__(self) -> None:
        """Reject an empty prefix. On a Cluster it is the hash tag of the queue's keys."""
        if not self.key_prefix:
            raise UsageError("--key-prefix must not be empty")

    @property
    def namespace(self) -> str:
        """Return the name shared by answers and queues: normal form, its version and the model version."""
        return f"{self.normalize}{NORMAL_FORM_VERSION}:{quote(self.model_version, safe='')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """How the proxy connects to Redis."""

    cache_url: str = flag(
        "--cache-url",
        options.TEXT,
        "embedded:",
        text="embedded:[DIR] (a server of its own), memory:, redis://, rediss://, valkey://, valkeys://, "
        "unix://, redis+cluster://HOST:PORT,…, redis+sentinel://HOST:PORT,…/SERVICE",
        password_alternative="--cache-password-file",  # noqa: S106 - a flag, not a password
    )
    cache_username: str | None = flag("--cache-username", options.TEXT, text="Redis ACL user")
    cache_password_file: str | None = flag(
        "--cache-password-file", options.TEXT, text="file with the password; read again when it changes"
    )
    sentinel_username: str | None = flag(
        "--sentinel-username", options.TEXT, text="ACL user of the Sentinels themselves"
    )
    sentinel_password_file: str | None = flag(
        "--sentinel-password-file",
        options.TEXT,
        text="file with the password of the Sentinels themselves; read again when it changes",
    )
    cache_tls_ca: str | None = flag("--cache-tls-ca", options.TEXT, text="CA that signed Redis's certificate")
    cache_timeout_seconds: float = flag(
        "--cache-timeout", options.DURATION, "250ms", text="how long Redis may take to answer"
    )

    def __post_init__(self) -> None:
        """Reject an invalid URL, and settings that need another kind of URL."""
        scheme = cache_url.parse(self.cache_url).scheme
        if self.cache_tls_ca is not None and scheme not in cache_url.TLS_CAPABLE_SCHEMES:
            message = (
                "--cache-tls-ca: only a rediss:// --cache-url is encrypted, a Cluster or Sentinels may be"
            )
            raise UsageError(message)
        if scheme != "redis+sentinel":
            for name, value in [
                ("--sentinel-username", self.sentinel_username),
                ("--sentinel-password-file", self.sentinel_password_file),
            ]:
                if value is not None:
                    message = f"{name}: only a redis+sentinel:// --cache-url has Sentinels to log in to"
                    raise UsageError(message)
        if self.cache_timeout_seconds <= 0:
            message = "--cache-timeout must be above 0"
            raise UsageError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """Which answers are served, and how old they may be."""

    cache_ttl_seconds: float = flag(
        "--cache-ttl",
        options.DURATION,
        "0",
        text="whole days (30d) after which a pair is inferred again; 0: never",
    )
    serve_stale: bool = flag(
        "--serve-stale", options.BOOL, "false", text="answer with what is older meanwhile"
    )
    previous_model_version: str | None = flag(
        "--previous-model-version",
        options.TEXT,
        text="whose answers are served, and refreshed behind, until this version has its own",
    )

    def __post_init__(self) -> None:
        """Reject a TTL that is not in whole days: the store has no finer resolution."""
        if self.cache_ttl_seconds % DAY_SECONDS or self.cache_ttl_seconds > _MAX_TTL_DAYS * DAY_SECONDS:
            message = f"--cache-ttl: it must be whole days, as in 30d, and at most {_MAX_TTL_DAYS}d"
            raise UsageError(message)

    @property
    def ttl_days(self) -> int:
        """Return the maximum age of an answer in days. 0 means no limit."""
        return int(self.cache_ttl_seconds // DAY_SECONDS)
