"""Every key in Redis: its name, its type and who writes it.

Names begin with the prefix of the deployment (`--key-prefix`). There are two groups:

- `CacheKeys`: answers, in hash buckets under one hash tag for each of 64 tags, so that a Cluster spreads
  them.
- `QueueKeys`: the miss queue, the limit on the model and the invalidations. All of them share the hash tag
  `{PREFIX}`, because one script reads and writes many of them.

`KEYS` lists all of them. A test compares it with the names in the Lua files.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

FORMAT = 1
"""The format of what replicas exchange through the shared queue.

It covers all keys under `QueueKeys.base` (records of pairs, lanes, claims, remembered outcomes, the queue's
metadata) and the messages on the channel. It is part of `QueueKeys.base`, and so of the channel's name: a
replica never reads what another format wrote. Field `format` of the deployment's hash `QueueKeys.limit` is
the format of the replicas that use the shared queue; a deployment without the field has format 1. Every
script compares it.

Three things have no format. Replicas of all formats share them, so their meaning must never change:

- `QueueKeys.limit` and the keys that begin with it: the limit, the membership and its heartbeats. New fields
  may be added. So there is one limit, and a replica of another format has its share (see
  `queue/lua/standby.lua`).
- The log and the tombstones of invalidations. An entry of the log that cannot be read counts as "all".
- Reports for the status page. One that cannot be read is left out.

The cache has a format of its keys, `CACHE_FORMAT`. It is not checked: another format has other keys, and an
entry that cannot be read is a miss. `CacheKeys.schemas` records how keys are made from pairs; the commands
check it.

Raise this number when a replica of the last release could misread what this one writes, or the other way
round (CONTRIBUTING.md, "Rolling upgrades").
"""

CACHE_FORMAT = "c2"
"""The format of entries, buckets and the checkpoints of `warm`, as part of their keys."""

_LOG = "log"
_TOMBSTONES = "tombs"


class CacheKeys:
    """The keys of the answer cache of one namespace (a model version and how its pairs are normalized)."""

    def __init__(self, *, prefix: str, namespace: str) -> None:
        self.schemas = f"{prefix}:made"
        """How the keys of each model version are made; one hash for all namespaces of the deployment."""
        self.base = f"{prefix}:{CACHE_FORMAT}:{namespace}:"
        """What the keys of answers begin with."""
        self.warm_checkpoints = f"{self.base}warm"
        """How many lines of each file `warm` has loaded."""

    def tag_state(self, tag: int) -> str:
        """Return the key of the state of a tag."""
        return tag_state_key(self.base, tag)


class QueueKeys:
    """The keys of the shared queue, all on one hash tag.

    There is one limit for a deployment, one queue for a namespace, and one record of failures for each model
    target.

    `base` itself is never a key. So while a Cluster moves the slot, a script, which declares both `limit` and
    `base`, is rejected (TRYAGAIN) instead of run on those keys of the queue that have not moved yet.
    """

    def __init__(
        self, *, prefix: str, namespace: str, model_target: str = "", queue_format: int = FORMAT
    ) -> None:
        self.format = queue_format
        self.limit = f"{{{prefix}}}:limit"
        """The limit on the model; its name also begins the names of the membership's keys."""
        target = blake2b(model_target.encode(), digest_size=8).hexdigest()
        self.model = f"{self.limit}:model:{target}"
        """The failures of a model target, for all namespaces that call it."""
        self.bases = [f"{{{prefix}}}:q{number}:{namespace}:" for number in range(1, queue_format + 1)]
        """The base of the queue's keys in each format up to this build's."""
        self.base = self.bases[-1]
        """What the keys of the queue of a namespace begin with."""
        self.invalidations = self.bases[0]
        """The base of the log and tombstones of invalidations, the same in every format."""
        self.invalidation_log = f"{self.invalidations}{_LOG}"
        self.tombstones = f"{self.invalidations}{_TOMBSTONES}"
        self.replicas = f"{self.limit}:replicas"
        self.paused = f"{self.limit}:paused"
        self.standby = f"{self.limit}:standby"
        self.spent = f"{self.limit}:spent"
        self.pairs = f"{self.base}pairs"
        self.claims = f"{self.base}claims"
        self.meta = f"{self.base}meta"
        self.quotas = f"{self.base}quotas"

    def lane(self, lane: str) -> str:
        """Return the key of a lane of waiting pairs."""
        return f"{self.base}lane:{lane}"

    def fair(self, lane: str) -> str:
        """Return the key of the finish tags of a lane's callers."""
        return f"{self.base}fair:{lane}"

    def reports(self, minute: int) -> str:
        """Return the key of the reports of all replicas for a minute since 1970."""
        return f"{self.limit}:reports:{minute}"

    def channel(self, database: int) -> str:
        """Return the channel for messages of this queue. A server has one set for all databases."""
        return f"{self.base}ended@{database}" if database else f"{self.base}ended"


def tag_state_key(base: str, tag: int) -> str:
    """Return the key of a tag's state; on a Cluster, the tag is also the hash tag of its keys."""
    return f"{base}{{{tag:02x}}}"


def bucket_key(base: str, tag: int, *, generation: str, number: int) -> str:
    """Return the key of a bucket of answers."""
    return f"{tag_state_key(base, tag)}{generation}:{number:x}"


def tombstones_key(invalidation_log: str) -> str:
    """Return the key of the tombstones that belong to a log of invalidations."""
    return f"{invalidation_log.removesuffix(_LOG)}{_TOMBSTONES}"


@dataclass(frozen=True, slots=True)
class KeySpec:
    """The description of a key, or of all keys that differ only in the parts in capital letters.

    `name` begins with SCHEMAS, CACHE, LIMIT, MODEL, BASE or INVALIDATIONS, the attributes `schemas` and
    `base` of `CacheKeys` and `limit`, `model`, `base` and `invalidations` of `QueueKeys`.
    """

    name: str
    type: Literal["hash", "list", "zset", "channel", "never exists"]
    writer: str
    content: str


KEYS = (
    KeySpec("SCHEMAS", "hash", "each replica, `warm`", "model version -> how its keys are made"),
    KeySpec("CACHEwarm", "hash", "`warm`", "file -> lines loaded"),
    KeySpec("CACHE{TAG}", "hash", "scripts of the store", "generation, buckets, pairs, swept, old"),
    KeySpec("CACHE{TAG}GENERATION:NUMBER", "hash", "scripts of the store", "11 bytes of digest -> value"),
    KeySpec("CACHE{TAG}nothing", "never exists", "none", "unlinked to allow writes while memory is full"),
    KeySpec("CACHE{TAG}-", "never exists", "none", "declared on a Cluster: TRYAGAIN while its slot moves"),
    KeySpec("LIMIT", "hash", "scripts of the queue", "rates, GCRA times, members, the queue's format"),
    KeySpec("MODEL", "hash", "scripts that end a call", "failures in a row, backoff, pushback, probe"),
    KeySpec("LIMIT:replicas", "zset", "heartbeats", "replica -> time of its last heartbeat"),
    KeySpec("LIMIT:addresses", "hash", "heartbeats", "replica -> host:port of its HTTP endpoint"),
    KeySpec("LIMIT:standby", "hash", "heartbeats", "replica of another format -> FORMAT:TIME"),
    KeySpec("LIMIT:paused", "hash", "probes of peers", "silent replica -> until when it calls nothing"),
    KeySpec("LIMIT:alone", "hash", "probes of peers", "replica that lost Redis -> until when that is known"),
    KeySpec("LIMIT:spent", "zset", "claims", "account -> GCRA time of its quota"),
    KeySpec("LIMIT:reports:MINUTE", "hash", "heartbeats", "replica -> its report for the status page"),
    KeySpec("BASEpairs", "hash", "scripts of the queue", "digest -> record of a pair that has not ended"),
    KeySpec("BASElane:LANE", "zset", "scripts of the queue", "digest -> tag, its position in the lane"),
    KeySpec("BASEfair:LANE", "hash", "scripts of the queue", "caller or account -> its last finish tag"),
    KeySpec("BASEsuspects", "list", "scripts of the queue", "groups of pairs, one of them rejected"),
    KeySpec("BASEmeta", "hash", "scripts of the queue", "id, count of messages, virtual times, outage"),
    KeySpec("BASEclaims", "hash", "claims", "claim id -> replica, times and lease"),
    KeySpec("BASEclaimed", "hash", "claims", "claim id -> its digests and what it spent of quotas"),
    KeySpec("BASEgranted:REPLICA", "hash", "claims", "id of the last claim of a replica"),
    KeySpec("BASEreserved", "hash", "enqueueing", "request -> pairs and bytes that are still to come"),
    KeySpec("BASEquotas", "hash", "enqueueing", "account -> its quota and when it was last used"),
    KeySpec("BASErecent:TIME", "hash", "completions", "digest -> level, of the last minute"),
    KeySpec("BASErefused:TIME", "hash", "rejections", "digest -> error, of the last ten minutes"),
    KeySpec("BASEbroke:TIME", "hash", "failures", "digest -> error of pairs that break the model"),
    KeySpec("BASEnonsense:TIME", "hash", "completions", "digest -> invalid responses of the model"),
    KeySpec("BASEnothing", "never exists", "none", "deleted to allow writes while memory is full"),
    KeySpec("BASEended", "channel", "scripts of the queue", "outcomes of pairs, changes of the queue"),
    KeySpec("INVALIDATIONSlog", "list", "`invalidate`, replicas", "token and digest, `*` or `-`"),
    KeySpec("INVALIDATIONStombs", "zset", "`invalidate`", "digest or `*` -> time of the invalidation"),
)
