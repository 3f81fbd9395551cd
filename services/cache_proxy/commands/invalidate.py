"""`cache-proxy invalidate`: remove a pair, or all pairs of a model version, from every cache.

The order of the steps matters:

1. Add a tombstone, so that a replica which is waiting for the model does not store the answer.
2. Delete the answer from the store.
3. Add an entry to the invalidation log, so that every replica removes the answer from its memory.

A lookup between two steps finds nothing, or an answer that the next step removes.
"""

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

# Redis unlinks them in half a millisecond.
_SWEEP_BUCKETS = 100


async def run(
    pair: PairSettings,
    scope: ScopeSettings,
    output: OutputSettings,
    cache: CacheSettings,
    key: KeySettings,
    answers: AnswerSettings,
) -> None:
    """Invalidate, and print the number of pairs that were in the store. 0 is not an error."""
    if (pair.pair is None) is not scope.all:
        raise UsageError("say what: --company and --title, or --all")
    async with open_session(cache, key) as session:
        sessions = [session]
        # Otherwise the answer of the previous model version would be served again.
        if answers.previous_model_version is not None:
            sessions.append(for_model_version(session, answers.previous_model_version))
        count = 0
        for one in sessions:
            if pair.pair is None:
                count += await _invalidate_all(one)
            else:
                count += await _invalidate_pair(one, *pair.pair)
    if output.json:
        sys.stdout.write(json.dumps({"invalidated": count}) + "\n")
    else:
        sys.stdout.write(f"{count:,} pairs invalidated\n" if count != 1 else "1 pair invalidated\n")


async def _invalidate_pair(session: CacheSession, company: str, title: str) -> int:
    digest = session.digest(company, title)
    await _add_tombstones(session, digest)
    count = await session.store.delete([digest])
    await session.invalidation_log.add([digest])
    return count


async def _invalidate_all(session: CacheSession) -> int:
    await _add_tombstones(session, b"")
    count = await session.store.clear()
    await session.invalidation_log.add_all()
    # Files that `warm` has read must be read again, since their answers are no longer in the cache.
    checkpoints_key = namespace.cache_keys(session.key_settings).warm_checkpoints
    await session.backend.execute(checkpoints_key, "UNLINK", checkpoints_key)
    for tag in range(TAGS):
        while (await session.store.sweep(tag, buckets=_SWEEP_BUCKETS)).has_leftovers:
            pass
    return count


async def _add_tombstones(session: CacheSession, digests: bytes) -> None:
    queue = namespace.queue_keys(session.key_settings)
    [reply] = await session.backend.run_script(
        ADD_TOMBSTONES, [ScriptCall(queue.tombstones, [digests, *queue.bases[1:]])]
    )
    if isinstance(reply, Exception):
        raise reply
