"""The key schemas of a deployment: how the keys of each model version are made.

They are stored in Redis in one hash, model version -> schema. Commands check it at the start: with settings
that lead to other keys than those of the proxies, they fail with an error instead of finding nothing.
"""

import logging
import re
from dataclasses import dataclass

from services.cache_proxy.cache.key import secret_fingerprint
from services.cache_proxy.config.cache_settings import NORMAL_FORMS, KeySettings
from services.cache_proxy.config.secret_file import read_secret
from services.cache_proxy.domain import NORMAL_FORM_VERSION
from services.cache_proxy.redis_client.backend import RedisBackend, run_replacing_wrong_type
from services.cache_proxy.redis_client.values import read_integer
from services.cache_proxy.redis_keys import CacheKeys, QueueKeys
from services.common.errors import UsageError

_log = logging.getLogger(__name__)

_MAX_NORMAL_FORM_VERSION = 1_000_000
_FINGERPRINT_PATTERN = re.compile(r"none|[0-9a-f]{1,64}")
_DAMAGED_MESSAGE = (
    "%s in Redis: the field %s is no description of how keys are made; "
    "replaced by this program's settings (%s)"
)


@dataclass(frozen=True, slots=True)
class KeySchema:
    """How the keys of a namespace are made: the normal form of texts and the secret of the digest.

    `secret_fingerprint` identifies the secret without revealing it; it is `none` where there is no secret.
    """

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
    """Return the schema of the keys that these settings make. Raises UsageError."""
    secret = read_secret(key_settings.key_secret_file, flag_name="--key-secret-file")
    return KeySchema(key_settings.normalize, NORMAL_FORM_VERSION, secret_fingerprint(secret))


async def register(
    backend: RedisBackend, key_settings: KeySettings, schema: KeySchema | None = None
) -> KeySchema | None:
    """Store the schema of a model version and return the previous one if it differs.

    The replica that started last decides. Raises `StoreError`.
    """
    schemas_key = cache_keys(key_settings).schemas
    schema = schema or key_schema(key_settings)
    stored = await run_replacing_wrong_type(
        backend, schemas_key, "HGET", schemas_key, key_settings.model_version
    )
    if stored is not None and stored.decode("utf-8", "replace") == str(schema):
        return None
    await backend.execute(schemas_key, "HSET", schemas_key, key_settings.model_version, str(schema))
    if stored is None:
        return None
    previous = _parse_schema(stored)
    if previous is None:
        _log.warning(_DAMAGED_MESSAGE, schemas_key, key_settings.model_version, schema)
    return previous


async def ensure_registered(backend: RedisBackend, key_settings: KeySettings, schema: KeySchema) -> None:
    """Store the schema if none is stored, so that commands find the deployment after a flush of Redis."""
    schemas_key = cache_keys(key_settings).schemas
    await run_replacing_wrong_type(
        backend, schemas_key, "HSETNX", schemas_key, key_settings.model_version, str(schema)
    )


async def verify(backend: RedisBackend, key_settings: KeySettings, *, allow_new: bool = False) -> None:
    """Raise UsageError if the deployment's proxies make their keys in another way than these settings.

    With `allow_new`, a deployment or model version that is not registered is accepted.
    """
    schemas_key = cache_keys(key_settings).schemas
    model_version = key_settings.model_version
    stored = await run_replacing_wrong_type(backend, schemas_key, "HGET", schemas_key, model_version)
    if stored is None:
        if allow_new:
            return
        known_versions = await backend.execute(schemas_key, "HKEYS", schemas_key)
        raise UsageError(
            _unknown_deployment_message(
                key_settings, [version.decode("utf-8", "replace") for version in known_versions]
            )
        )
    registered = _parse_schema(stored)
    schema = key_schema(key_settings)
    if registered is None:
        _log.warning(_DAMAGED_MESSAGE, schemas_key, model_version, schema)
        await backend.execute(schemas_key, "HSET", schemas_key, model_version, str(schema))
        return
    if registered.normalize != schema.normalize:
        message = (
            f"--normalize {schema.normalize}: this deployment's keys are made with {registered.normalize}"
        )
        raise UsageError(message)
    if registered.normal_form_version != schema.normal_form_version:
        message = (
            f"this program makes keys of normal form {schema.normal_form_version}, "
            f"and the deployment's are of {registered.normal_form_version}: use the proxies' own version"
        )
        raise UsageError(message)
    if registered.secret_fingerprint != schema.secret_fingerprint:
        raise UsageError("--key-secret-file: this deployment's keys are made with another secret")


def _parse_schema(stored: bytes) -> KeySchema | None:
    """Return the stored schema, or None if it is garbage."""
    words = stored.split(b" ")
    if len(words) != len(KeySchema.__dataclass_fields__):
        return None
    version = read_integer(words[1], minimum=1, maximum=_MAX_NORMAL_FORM_VERSION)
    normalize, fingerprint = (word.decode("ascii", "replace") for word in (words[0], words[2]))
    if version is None or normalize not in NORMAL_FORMS or not _FINGERPRINT_PATTERN.fullmatch(fingerprint):
        return None
    return KeySchema(normalize, version, fingerprint)


def _unknown_deployment_message(key_settings: KeySettings, known_versions: list[str]) -> str:
    if not known_versions:
        return f"--key-prefix {key_settings.key_prefix}: there is no such deployment"
    versions = ", ".join(sorted(known_versions)[:10])
    return f"--model-version {key_settings.model_version}: the deployment knows only {versions}"
