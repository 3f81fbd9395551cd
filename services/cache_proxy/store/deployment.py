"""What a deployment's keys are called, and the note of what its namespaces were made with.

`PREFIX:made` is a hash: model version -> how its keys were made. Commands that would look in another place,
or hash in another way, than the proxies do, are told so instead of finding nothing.
"""

from dataclasses import dataclass

from services.cache_proxy.config import KeySettings, read_secret
from services.cache_proxy.key import NORMAL_FORM_VERSION, fingerprint
from services.cache_proxy.queue.scripts import Keys
from services.cache_proxy.store.servers import Servers, heal
from services.common.errors import UsageError

_LAYOUT = "c2"


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


async def note(servers: Servers, key: KeySettings) -> Recipe | None:
    """Leave the note; the newest start's is what counts. What it was before, if that differs."""
    made = _made_key(key)
    mine = recipe(key)
    before = await heal(servers, made, "HGET", made, key.model_version)
    if before is not None and before.decode("utf-8", "replace") == str(mine):
        return None
    await servers.command(made, "HSET", made, key.model_version, str(mine))
    return None if before is None else _parsed(before)


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


def _parsed(stored: bytes) -> Recipe:
    words = stored.decode("utf-8", "replace").split(" ")
    if len(words) != len(Recipe.__dataclass_fields__) or not words[1].isdecimal():
        return Recipe("something else", 0, "")
    return Recipe(words[0], int(words[1]), words[2])


def _unknown(key: KeySettings, known: list[str]) -> str:
    if not known:
        return f"--key-prefix {key.key_prefix}: there is no such deployment"
    versions = ", ".join(sorted(known)[:10])
    return f"--model-version {key.model_version}: the deployment knows only {versions}"
