"""`cache-proxy invalidate`: have every replica forget a pair, or all of a model version."""

import json
import sys

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.cache_scripts import BURY
from services.cache_proxy.commands.session import Cache, open_cache, version_of
from services.cache_proxy.config.command_settings import OutputSettings, PairSettings, ScopeSettings
from services.cache_proxy.config.settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.queue.queue_scripts import Keys
from services.cache_proxy.redis_client.backend import Call
from services.common.errors import UsageError

_STEP_BUCKETS = 100  # unlinked in half a millisecond


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
    async with open_cache(cache, key) as opened:
        versions = [opened]
        if answers.previous_model_version is not None:  # or its answer would come back
            versions.append(version_of(opened, answers.previous_model_version))
        count = 0
        for version in versions:
            if pair.pair is None:
                count += await _invalidate_all(version)
            else:
                count += await _invalidate(version, *pair.pair)
    if output.json:
        sys.stdout.write(json.dumps({"invalidated": count}) + "\n")
    else:
        sys.stdout.write(f"{count:,} pairs invalidated\n" if count != 1 else "1 pair invalidated\n")


# The order: first whoever is asking the model now is told (a tombstone) not to remember what it is about to
# hear, then what is remembered goes, then replicas are told to forget; whoever looks it up in between finds
# nothing.


async def _invalidate(cache: Cache, company: str, title: str) -> int:
    digest = cache.digest(company, title)
    await _bury(cache, digest)
    count = await cache.store.forget([digest])
    await cache.log.add([digest])
    return count


async def _invalidate_all(cache: Cache) -> int:
    await _bury(cache, b"")
    count = await cache.store.clear()
    await cache.log.add_all()
    bookmarks = namespace.bookmarks_key(
        cache.key
    )  # files that were warmed from are not in the cache any more
    await cache.servers.command(bookmarks, "UNLINK", bookmarks)
    for tag in range(TAGS):
        while (await cache.store.sweep(tag, buckets=_STEP_BUCKETS)).more:
            pass
    return count


async def _bury(cache: Cache, digests: bytes) -> None:
    queue = Keys(prefix=cache.key.key_prefix, namespace=cache.key.namespace)
    [reply] = await cache.servers.run(BURY, [Call(queue.tombstones, [digests, *queue.bases[1:]])])
    if isinstance(reply, Exception):
        raise reply
