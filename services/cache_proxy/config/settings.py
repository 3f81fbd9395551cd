"""The proxy's settings: frozen, checked once, and the only place that reads flags or environment."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from services.cache_proxy.cache.key import NORMAL_FORM_VERSION
from services.cache_proxy.config import cache_url
from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.common import options
from services.common.errors import UsageError
from services.common.file_reload import read_file
from services.common.grpc_target import check_target
from services.common.listening import check_address
from services.common.options import flag
from services.common.redaction import warn_if_world_readable

ENV_PREFIX = "CACHE_PROXY"
DEFAULT_EMBEDDED_DIR = ".cache-proxy"
DAY_SECONDS = 86_400
_MAX_TTL_DAYS = 3_650
NORMAL_FORMS = ("fold", "exact")
_MAX_BATCH_PAIRS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class KeySettings:
    """What shapes a key in the cache: the same for every replica and command of a deployment."""

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
        """Refuse a prefix that is none: what keeps the queue's keys together on a Cluster would be empty."""
        if not self.key_prefix:
            raise UsageError("--key-prefix must not be empty")

    @property
    def namespace(self) -> str:
        """What answers and queues of one kind have in common: normal form, its version, the model's."""
        return f"{self.normalize}{NORMAL_FORM_VERSION}:{quote(self.model_version, safe='')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """How Redis is reached."""

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
        """Refuse a URL that cannot be used, and what goes with another kind of URL."""
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
    """Whose answers are served, and how old they may be."""

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
        """Refuse an age that is not in days: the store knows no hours."""
        if self.cache_ttl_seconds % DAY_SECONDS or self.cache_ttl_seconds > _MAX_TTL_DAYS * DAY_SECONDS:
            message = f"--cache-ttl: it must be whole days, as in 30d, and at most {_MAX_TTL_DAYS}d"
            raise UsageError(message)

    @property
    def ttl_days(self) -> int:
        """0: any age."""
        return int(self.cache_ttl_seconds // DAY_SECONDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """How the model is called, and how much of it may be used."""

    model_target: str = flag(
        "--model-target",
        options.TEXT,
        required=True,
        text="gRPC target of the model: HOST:PORT, dns:///HOST:PORT, unix:PATH",
    )
    model_batch_size: int = flag(
        "--model-batch-size", options.COUNT, "1000", text="pairs in one call to the model, at most"
    )
    model_batch_bytes: int = flag(
        "--model-batch-bytes", options.SIZE, "3MiB", text="bytes in one call to the model, at most"
    )
    model_rate: float = flag(
        "--model-rate", options.RATE, "1000", text="requests a second to the model, all replicas together"
    )
    model_calls_per_second: float = flag(
        "--model-calls-per-second",
        options.RATE_OR_ZERO,
        "1",
        text="calls a second to the model, all replicas together; 0: no such limit",
    )
    expected_replicas: int = flag(
        "--expected-replicas",
        options.COUNT,
        "1",
        text="the share of the rate of a replica that never saw Redis",
    )
    linger_seconds: float = flag(
        "--linger",
        options.DURATION,
        "20ms",
        text="how long a miss may wait for company when a call slot is free",
    )
    model_deadline_seconds: float = flag(
        "--model-deadline", options.DURATION, "30s", text="how long one call to the model may take"
    )
    model_retry_window_seconds: float = flag(
        "--model-retry-window",
        options.DURATION,
        "15s",
        text="how long pairs are retried while the model answers nothing",
    )

    def __post_init__(self) -> None:
        """Refuse what could never call the model."""
        if self.model_batch_size > _MAX_BATCH_PAIRS:
            message = (
                f"--model-batch-size {self.model_batch_size}: the model takes at most {_MAX_BATCH_PAIRS}"
            )
            raise UsageError(message)
        if not self.model_target.strip():
            message = "--model-target must not be empty"
            raise UsageError(message)
        check_target(self.model_target, flag_name="--model-target", tls_flag="--model-tls-ca")
        if self.model_deadline_seconds <= 0:
            message = "--model-deadline must be above 0"
            raise UsageError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Where the proxy listens, what it bears, and how it ends."""

    listen: tuple[str, ...] = flag(
        "--listen",
        options.LIST,
        "0.0.0.0:50051",
        text="address for callers; repeatable; unix:/path too; port 0 picks one; 0.0.0.0, [::] and no host "
        "mean every address, IPv4 and IPv6",
    )
    listen_plaintext: tuple[str, ...] = flag(
        "--listen-plaintext",
        options.LIST,
        text="as --listen, and without TLS whatever --tls-cert says: for probes and callers on this machine, "
        "which then need no certificate",
    )
    listen_mode: int | None = flag(
        "--listen-mode", options.MODE, text="octal mode of Unix sockets, as in 0660; by the umask if not set"
    )
    http_listen: str = flag(
        "--http-listen", options.TEXT, "0.0.0.0:9464", text="address for /metrics, /healthz and /readyz"
    )
    l1_max_bytes: int = flag("--l1-max-bytes", options.SIZE, "256MiB", text="in-process cache; 0: none")
    max_request_pairs: int = flag(
        "--max-request-pairs", options.COUNT, "100000", text="pairs in one RPC, at most"
    )
    max_request_bytes: int = flag(
        "--max-request-bytes", options.SIZE, "64MiB", text="bytes in one RPC, at most"
    )
    max_field_bytes: int = flag(
        "--max-field-bytes", options.SIZE, "4096", text="UTF-8 bytes in a company or a title, at most"
    )
    max_queued_pairs: int = flag(
        "--max-queued-pairs", options.COUNT, "1000000", text="pairs waiting for the model, at most"
    )
    max_queued_bytes: int = flag(
        "--max-queued-bytes", options.SIZE, "1GiB", text="bytes of pairs waiting for the model, at most"
    )
    caller_quotas_file: str | None = flag(
        "--caller-quotas-file",
        options.TEXT,
        text="JSON: how much of model and queue each caller may have, all replicas together; read again when "
        "it changes",
    )
    max_wait_seconds: float = flag(
        "--max-wait", options.DURATION, "5m", text="how long a caller without a deadline waits, at most"
    )
    max_connection_age_seconds: float = flag(
        "--max-connection-age",
        options.DURATION,
        "30m",
        text="after which a connection is closed gracefully, so that callers find new replicas",
    )
    drain_delay_seconds: float = flag(
        "--drain-delay", options.DURATION, "5s", text="after SIGTERM, still serve so long, as NOT_SERVING"
    )
    drain_timeout_seconds: float = flag(
        "--drain-timeout", options.DURATION, "30s", text="how long what is in flight may take to end"
    )
    log_format: str = flag("--log-format", options.choice("json", "text"), "json", text="of the log lines")
    log_level: str = flag(
        "--log-level", options.choice("debug", "info", "warning", "error"), "info", text="least level logged"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be listened on, and bounds that let nothing through."""
        for address in self.listen:
            check_address(address, flag_name="--listen", allow_unix=True)
        for address in self.listen_plaintext:
            check_address(address, flag_name="--listen-plaintext", allow_unix=True)
        check_address(self.http_listen, flag_name="--http-listen")
        if not self.max_request_bytes:
            message = "--max-request-bytes must be above 0"
            raise UsageError(message)
        if not self.max_field_bytes:
            message = "--max-field-bytes must be above 0"
            raise UsageError(message)
        if not self.max_wait_seconds:
            message = "--max-wait must be above 0"
            raise UsageError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All that `serve` is told."""

    server: ServerSettings
    model: ModelSettings
    cache: CacheSettings
    key: KeySettings
    answers: AnswerSettings
    caller_auth: CallerAuthSettings = field(default_factory=CallerAuthSettings)
    model_auth: ModelAuthSettings = field(default_factory=ModelAuthSettings)

    def __post_init__(self) -> None:
        """Refuse a version that is its own previous one, and a token that others could read."""
        self.model_auth.require_encrypted(self.model.model_target)
        if self.answers.previous_model_version == self.key.model_version:
            raise UsageError("--previous-model-version must not be --model-version")


def read_secret(path: str | None, *, flag_name: str) -> bytes | None:
    """The content of a secret's file, less its final newline. Raises UsageError."""
    if path is None:
        return None
    secret = read_file(path, flag_name=flag_name).rstrip(b"\r\n")
    if not secret:
        message = f"{flag_name} {path}: the file is empty"
        raise UsageError(message)
    warn_if_world_readable(Path(path), flag_name=flag_name)
    return secret


def redact_url(url: str) -> str:
    """The URL without a password in it, for logs and errors: neither before an @ nor in a parameter."""
    address, question, _ = url.partition("?")
    scheme, slashes, rest = address.partition("://")
    if "@" in rest:  # the last one: a password that should have been quoted may hold others, and slashes
        address = f"{scheme}{slashes}***@{rest.rpartition('@')[2]}"
    return f"{address}?***" if question else address
