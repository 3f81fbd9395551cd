"""The list of all keys in Redis: it agrees with the Lua files and with what the proxy writes."""

import re
from collections.abc import Iterator
from pathlib import Path

import redis
from prometheus_client import CollectorRegistry

from services.cache_proxy import cache, queue
from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.config.cache_settings import KeySettings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import ScriptCall
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from services.cache_proxy.redis_keys import KEYS, CacheKeys, QueueKeys, tombstones_key
from tests.support.replicas import QueueLocation, numbered_pairs, queue_limits, replicas

LUA_FOLDERS = [Path(package.__path__[0]) / "lua" for package in (cache, queue)]


def _names_in_lua() -> Iterator[str]:
    """Yield the names of keys that Lua files spell, up to a part that differs."""
    for folder in LUA_FOLDERS:
        for path in folder.rglob("*.lua"):
            text = path.read_text()
            for base, name in re.findall(r"\b(BASE|LIMIT|INVALIDATIONS) \.\. '(:?[a-z]+:?)'", text):
                yield base + name
            for name, base in re.findall(r"'%s(:[a-z]+:)%d', (LIMIT)", text):
                yield base + name
            for name in re.findall(r"\b(?:recent_key|outcome_key|remember)\('([a-z]+)'", text):
                yield f"BASE{name}:"


def test_key_names_in_lua_are_those_of_the_list() -> None:
    """A key that is added to a script is added to the list, with its type and writer."""
    listed = {re.sub(r"[A-Z]+$", "", spec.name) for spec in KEYS}
    listed = {name for name in listed if re.match(r"(BASE|LIMIT|INVALIDATIONS):?[a-z]", name)}
    in_lua = set(_names_in_lua())
    assert in_lua <= listed
    # The channel is an argument of the scripts; the kinds of rejections are arguments of a function.
    assert listed - in_lua <= {"BASEended", "BASEbroke:", "BASErefused:"}


def test_names_of_the_list_are_distinct() -> None:
    """No key is described twice."""
    assert len({spec.name for spec in KEYS}) == len(KEYS)


def test_tombstones_key_follows_from_the_log() -> None:
    """Log and tombstones of invalidations are the same keys in every format of the queue."""
    keys = QueueKeys(prefix="p", namespace="n", queue_format=7)
    assert tombstones_key(keys.invalidation_log) == keys.tombstones
    assert (keys.invalidation_log, keys.base) == ("{p}:q1:n:log", "{p}:q7:n:")


def _listed_types(key: str, cache_keys: CacheKeys, queue_keys: QueueKeys) -> set[str]:
    """Return the types that the list has for the name of a key; empty if it is not listed."""
    bases = {
        "SCHEMAS": cache_keys.schemas,
        "CACHE": cache_keys.base,
        "LIMIT": queue_keys.limit,
        "MODEL": f"{queue_keys.limit}:model:TARGET",
        "BASE": queue_keys.base,
        "INVALIDATIONS": queue_keys.invalidations,
    }
    types: set[str] = set()
    for spec in KEYS:
        [base] = [base for base in bases if spec.name.startswith(base)]
        name = bases[base] + spec.name.removeprefix(base)
        if re.fullmatch(re.sub(r"[A-Z]+", ".+", re.escape(name)), key):
            types.add(spec.type)
    return types


async def test_keys_in_redis_are_listed_with_their_type(shared_redis: str) -> None:
    """Whatever a queue, a store and an invalidation leave in Redis has a name and a type of the list."""
    location = QueueLocation.create(shared_redis)
    prefix = location.keys.limit.partition("}")[0].removeprefix("{")
    settings = KeySettings(key_prefix=prefix)
    cache_keys = namespace.cache_keys(settings)
    queue_keys = namespace.queue_keys(settings)
    backend = backend_for(create_client(shared_redis, timeout_seconds=5))
    await namespace.register(backend, settings)
    metrics = ProxyMetrics(CollectorRegistry())
    await RedisStore(backend, base_key=cache_keys.base, metrics=metrics).put({bytes(16): 3})
    await InvalidationLog(backend, queue_keys.invalidation_log).add([bytes(16)])
    await backend.run_script(ADD_TOMBSTONES, [ScriptCall(queue_keys.tombstones, [bytes(16)])])
    await backend.close()
    found = {}
    async with replicas(location.with_namespace(settings.namespace), 1, queue_limits(batch_pairs=4)) as [
        replica
    ]:
        await replica.enqueue(numbered_pairs(range(8)))
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        await replica.claim_batch()
        with redis.Redis.from_url(shared_redis) as client:
            found = {key.decode(): client.type(key).decode() for key in client.scan_iter(f"*{prefix}*")}
    assert len(found) > 12
    assert [
        key for key, kind in found.items() if kind not in _listed_types(key, cache_keys, queue_keys)
    ] == []
    location.flush()
