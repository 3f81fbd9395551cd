"""What a deployment's keys are called, and the note of what its namespaces were made with.

`PREFIX:made` is a hash: model version -> how its keys were made. Commands that would look in another place,
or hash in another way, than the proxies do, are told so instead of finding nothing.
"""

import logging
import re
from dataclasses import dataclass

from services.cache_proxy.cache.key import NORMAL_FORM_VERSION, secret_fingerprint
from services.cache_proxy.config.settings import NORMAL_FORMS, KeySettings, read_secret
from services.cache_proxy.redis_client.backend import RedisBackend, run_replacing_wrong_type
from services.cache_proxy.redis_client.values import read_integer
from services.cache_proxy.redis_keys import CacheKeys, QueueKeys
from services.common.errors import UsageError

_log = logging.getLogger(__name__)

_MAX_NORMAL_FORM_VERSION = 1_000_000
_FINGERPRINT_PATTERN = re.compile(r"none|[0-9a-f]{1,64}")
_DAMAGED_MESSAGE = (
    "%s in Redis: the field %s does not say how keys are made; replaced by this program's settings (%s)"
)


@dataclass(frozen=True, slots=True)
class KeySchema:
    """How a namespace's keys are made."""

    normalize: str
    normal_form_version: int
    secret_fingerprint: str

    def __str__(self) -> str:
        return f"{self.normalize} {self.normal_form_version} {self.secret_fingerprint}"


def cache_keys(key_settings: KeySettings) -> CacheKeys:
    """Return the keys of the answer cache that these settings name."""
    return CacheKeys(prefix=key_settings.key_prefix, namespace=key_settings.namespace)


def queue_keys(key_settings: KeySettings) -> QueueKeys:
    """Return the keys of the shared queue and of the invalidations beside it that these settings name."""
    return QueueKeys(prefix=key_settings.key_prefix, namespace=key_settings.namespace)


def key_schema(key_settings: KeySettings) -> KeySchema:
    """How these settings make keys."""
    secret = read_secret(key_settings.key_secret_file, flag_name="--key-secret-file")
    return KeySchema(key_settings.normalize, NORMAL_FORM_VERSION, secret_fingerprint(secret))


async def register(
    backend: RedisBackend, key_settings: KeySettings, schema: KeySchema | None = None
) -> KeySchema | None:
    """Leave the note; the newest start's is what counts. What it was before, if that differs."""
    made = cache_keys(key_settings).schemas
    schema = schema or key_schema(key_settings)
    before = await run_replacing_wrong_type(backend, made, "HGET", made, key_settings.model_version)
    if before is not None and before.decode("utf-8", "replace") == str(schema):
        return None
    await backend.execute(made, "HSET", made, key_settings.model_version, str(schema))
    if before is None:
        return None
    theirs = _parse_schema(before)
    if theirs is None:
        _log.warning(_DAMAGED_MESSAGE, made, key_settings.model_version, schema)
    return theirs


async def ensure_registered(backend: RedisBackend, key_settings: KeySettings, schema: KeySchema) -> None:
    """Leave the note if there is none any more: after a flush, commands still find the deployment."""
    made = cache_keys(key_settings).schemas
    await run_replacing_wrong_type(backend, made, "HSETNX", made, key_settings.model_version, str(schema))


async def verify(backend: RedisBackend, key_settings: KeySettings, *, allow_new: bool = False) -> None:
    """Raises UsageError when the deployment's proxies make their keys in another way than these settings."""
    made = cache_keys(key_settings).schemas
    stored = await run_replacing_wrong_type(backend, made, "HGET", made, key_settings.model_version)
    if stored is None:
        if allow_new:
            return
        known = await backend.execute(made, "HKEYS", made)
        raise UsageError(
            _unknown_deployment_message(key_settings, [name.decode("utf-8", "replace") for name in known])
        )
    theirs, mine = _parse_schema(stored), key_schema(key_settings)
    if theirs is None:
        _log.warning(_DAMAGED_MESSAGE, made, key_settings.model_version, mine)
        await backend.execute(made, "HSET", made, key_settings.model_version, str(mine))
        return
    if theirs.normalize != mine.normalize:
        message = f"--normalize {mine.normalize}: this deployment's keys are made with {theirs.normalize}"
        raise UsageError(message)
    if theirs.normal_form_version != mine.normal_form_version:
        message = (
            f"this program makes keys of normal form {mine.normal_form_version}, "
            f"and the deployment's are of {theirs.normal_form_version}: use the proxies' own version"
        )
        raise UsageError(message)
    if theirs.secret_fingerprint != mine.secret_fingerprint:
        raise UsageError("--key-secret-file: this deployment's keys are made with another secret")


def _parse_schema(stored: bytes) -> KeySchema | None:
    """Return what was noted, or None if it is garbage."""
    words = stored.split(b" ")
    if len(words) != len(KeySchema.__dataclass_fields__):
        return None
    version = read_integer(words[1], minimum=1, maximum=_MAX_NORMAL_FORM_VERSION)
    normalize, secret = (word.decode("ascii", "replace") for word in (words[0], words[2]))
    if version is None or normalize not in NORMAL_FORMS or not _FINGERPRINT_PATTERN.fullmatch(secret):
        return None
    return KeySchema(normalize, version, secret)


def _unknown_deployment_message(key_settings: KeySettings, known_versions: list[str]) -> str:
    if not known_versions:
        return f"--key-prefix {key_settings.key_prefix}: there is no such deployment"
    versions = ", ".join(sorted(known_versions)[:10])
    return f"--model-version {key_settings.model_version}: the deployment knows only {versions}"
