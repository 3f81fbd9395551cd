"""`cache-proxy invalidate`: have every replica forget a pair, or all of a model version."""

import json
import sys

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.commands.session import CacheSession, for_model_version, open_session
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import OutputSettings, PairSettings, ScopeSettings
from services.cache_proxy.redis_client.backend import ScriptCall
from services.common.errors import UsageError

_SWEEP_BUCKETS = 100  # unlinked in half a millisecond


async def run(
    pair: PairSettings,
    scope: ScopeSettings,
    output: OutputSettings,
    cache: CacheSettings,
    key: KeySettings,
    answers: AnswerSettings,
) -> None:
    """Print how many pairs were forgotten; none is no error."""
    if (pair.pair is None) is not scope.all:
        raise UsageError("say what: --company and --title, or --all")
    async with open_session(cache, key) as opened:
        versions = [opened]
        if answers.previous_model_version is not None:  # or its answer would come back
            versions.append(for_model_version(opened, answers.previous_model_version))
        count = 0
        for version in versions:
            if pair.pair is None:
                count += await _invalidate_all(version)
            else:
                count += await _invalidate_pair(version, *pair.pair)
    if output.json:
        sys.stdout.write(json.dumps({"invalidated": count}) + "\n")
    else:
        sys.stdout.write(f"{count:,} pairs invalidated\n" if count != 1 else "1 pair invalidated\n")


# The order: first whoever is asking the model now is told (a tombstone) not to remember what it is about to
# hear, then what is remembered goes, then replicas are told to forget; whoever looks it up in between finds
# nothing.


async def _invalidate_pair(cache: CacheSession, company: str, title: str) -> int:
    digest = cache.digest(company, title)
    await _add_tombstones(cache, digest)
    count = await cache.store.delete([digest])
    await cache.invalidation_log.add([digest])
    return count


async def _invalidate_all(cache: CacheSession) -> int:
    await _add_tombstones(cache, b"")
    count = await cache.store.clear()
    await cache.invalidation_log.add_all()
    # Files that were warmed from are not in the cache any more.
    bookmarks = namespace.cache_keys(cache.key_settings).warm_checkpoints
    await cache.backend.execute(bookmarks, "UNLINK", bookmarks)
    for tag in range(TAGS):
        while (await cache.store.sweep(tag, buckets=_SWEEP_BUCKETS)).has_leftovers:
            pass
    return count


async def _add_tombstones(cache: CacheSession, digests: bytes) -> None:
    queue = namespace.queue_keys(cache.key_settings)
    [reply] = await cache.backend.run_script(
        ADD_TOMBSTONES, [ScriptCall(queue.tombstones, [digests, *queue.bases[1:]])]
    )
    if isinstance(reply, Exception):
        raise reply
