"""`cache-proxy stats`: show the size of the cache, its memory, and whether its buckets are compact."""

import json
import random
import sys
from collections import Counter

from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.commands.session import CacheSession, open_session
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import OutputSettings
from services.cache_proxy.errors import StoreError

_SAMPLES_PER_TAG = 8
# `ziplist` is the name before Redis 7.
_COMPACT_ENCODINGS = {"listpack", "ziplist"}


async def run(output: OutputSettings, cache: CacheSettings, key: KeySettings) -> None:
    """Print the statistics as a table or as one JSON object."""
    async with open_session(cache, key) as session:
        stats = await _collect(session)
    if output.json:
        sys.stdout.write(json.dumps(stats) + "\n")
        return
    for name, value in stats.items():
        sys.stdout.write(f"{name.replace('_', ' '):<22}{_format_value(value)}\n")
    if stats["buckets_compact"] is False:
        sys.stdout.write(
            "\nSome buckets are not compact: each of their pairs costs several times as much.\n"
            "Set hash-max-listpack-entries (hash-max-ziplist-entries) to 128 or more.\n"
        )


async def _collect(session: CacheSession) -> dict[str, object]:
    start = random.random()  # noqa: S311 - a sample, not a secret
    tags = [await session.store.inspect(tag, samples=_SAMPLES_PER_TAG, start=start) for tag in range(TAGS)]
    samples = [sample for tag in tags for sample in tag.samples]
    encodings = Counter(name for name, _, _ in samples)
    sampled_pairs = sum(pairs for _, pairs, _ in samples)
    sampled_bytes = sum(size for _, _, size in samples)
    return {
        "model_version": session.key_settings.model_version,
        "pairs": sum(tag.pairs for tag in tags),
        "buckets": sum(tag.buckets for tag in tags),
        "bytes_a_pair": round(sampled_bytes / sampled_pairs, 1) if sampled_pairs else None,
        "fullest_sampled": max((pairs for _, pairs, _ in samples), default=0),
        "encodings": dict(encodings),
        "buckets_compact": set(encodings) <= _COMPACT_ENCODINGS,
        "being_removed": sum(tag.leftovers for tag in tags) > 0,
        "garbage_seen": sum(tag.garbage for tag in tags),
        "eviction": await _eviction_policy(session),
    }


async def _eviction_policy(session: CacheSession) -> str | None:
    """Return the eviction policy of Redis, None if this user may not read it."""
    try:
        info = await session.backend.execute(session.invalidation_log.key, "INFO", "memory")
    except StoreError:
        return None
    return str(info["maxmemory_policy"]) if isinstance(info, dict) and "maxmemory_policy" in info else None


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)
