"""What a deployment's keys are called, and the note of what its namespaces were made with.

`PREFIX:made` is a hash: model version -> how its keys were made. Commands that would look in another place,
or hash in another way, than the proxies do, are told so instead of finding nothing.
"""

import logging
import re
from dataclasses import dataclass

from services.cache_proxy.cache.key import NORMAL_FORM_VERSION, fingerprint
from services.cache_proxy.config.settings import NORMAL_FORMS, KeySettings, read_secret
from services.cache_proxy.queue.queue_scripts import Keys
from services.cache_proxy.redis_client.backend import Servers, heal
from services.cache_proxy.redis_client.values import read_integer
from services.common.errors import UsageError

_log = logging.getLogger(__name__)

_LAYOUT = "c2"
_MAX_NORMAL_FORM_VERSION = 1_000_000
_SECRET = re.compile(r"none|[0-9a-f]{1,64}")
_DAMAGED = (
    "%s in Redis: the field %s does not say how keys are made; replaced by this program's settings (%s)"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a namespace's keys are made."""

    normalize: str
    normal_form_version: int
    secret: str

    def __str__(self) -> str:
        return f"{self.normalize} {self.normal_form_version} {self.secret}"


def base_key(key: KeySettings) -> str:
    """What every key of a namespace in the store begins with."""
    return f"{key.key_prefix}:{_LAYOUT}:{key.namespace}:"


def log_key(key: KeySettings) -> str:
    """Where the log of invalidations is: beside the miss queue, whose heartbeats tell of it."""
    return Keys(prefix=key.key_prefix, namespace=key.namespace).log


def bookmarks_key(key: KeySettings) -> str:
    """Where `warm` notes how far it came: a hash, file -> lines."""
    return f"{base_key(key)}warm"


def recipe(key: KeySettings) -> Recipe:
    """How these settings make keys."""
    secret = read_secret(key.key_secret_file, flag_name="--key-secret-file")
    return Recipe(key.normalize, NORMAL_FORM_VERSION, fingerprint(secret))


async def note(servers: Servers, key: KeySettings, mine: Recipe | None = None) -> Recipe | None:
    """Leave the note; the newest start's is what counts. What it was before, if that differs."""
    made = _made_key(key)
    mine = mine or recipe(key)
    before = await heal(servers, made, "HGET", made, key.model_version)
    if before is not None and before.decode("utf-8", "replace") == str(mine):
        return None
    await servers.command(made, "HSET", made, key.model_version, str(mine))
    if before is None:
        return None
    theirs = _parsed(before)
    if theirs is None:
        _log.warning(_DAMAGED, made, key.model_version, mine)
    return theirs


async def note_again(servers: Servers, key: KeySettings, mine: Recipe) -> None:
    """Leave the note if there is none any more: after a flush, commands still find the deployment."""
    made = _made_key(key)
    await heal(servers, made, "HSETNX", made, key.model_version, str(mine))


async def check(servers: Servers, key: KeySettings, *, may_be_new: bool = False) -> None:
    """Raises UsageError when the deployment's proxies make their keys in another way than these settings."""
    made = _made_key(key)
    stored = await heal(servers, made, "HGET", made, key.model_version)
    if stored is None:
        if may_be_new:
            return
        known = await servers.command(made, "HKEYS", made)
        raise UsageError(_unknown(key, [name.decode("utf-8", "replace") for name in known]))
    theirs, mine = _parsed(stored), recipe(key)
    if theirs is None:
        _log.warning(_DAMAGED, made, key.model_version, mine)
        await servers.command(made, "HSET", made, key.model_version, str(mine))
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
    if theirs.secret != mine.secret:
        raise UsageError("--key-secret-file: this deployment's keys are made with another secret")


def _made_key(key: KeySettings) -> str:
    return f"{key.key_prefix}:made"


def _parsed(stored: bytes) -> Recipe | None:
    """Return what was noted, or None if it is garbage."""
    words = stored.split(b" ")
    if len(words) != len(Recipe.__dataclass_fields__):
        return None
    version = read_integer(words[1], minimum=1, maximum=_MAX_NORMAL_FORM_VERSION)
    normalize, secret = (word.decode("ascii", "replace") for word in (words[0], words[2]))
    if version is None or normalize not in NORMAL_FORMS or not _SECRET.fullmatch(secret):
        return None
    return Recipe(normalize, version, secret)


def _unknown(key: KeySettings, known: list[str]) -> str:
    if not known:
        return f"--key-prefix {key.key_prefix}: there is no such deployment"
    versions = ", ".join(sorted(known)[:10])
    return f"--model-version {key.model_version}: the deployment knows only {versions}"
