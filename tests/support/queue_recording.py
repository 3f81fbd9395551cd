"""What a build of the proxy leaves in Redis for other replicas, recorded as bytes.

`python -m tests.support.queue_recording` records the last release again, into its folder of fixtures.

Two replicas of the build run over a real Redis and a scripted model, through all that makes a record:

- pairs that wait, also in lanes of quotas, and pairs in claims,
- levels, invalid levels, rejected pairs, failed calls, and a pair that breaks the model,
- a request that is enqueued in several chunks, and an invalidation.

Every key is read every few milliseconds, and every message is kept.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgpack
import redis

from tests.support.caller import Caller, open_caller
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    ScriptedModel,
    answer_all,
    scripted_model,
)
from tests.support.processes import ServiceProcess, clean_environment
from tests.support.redis_server import RedisServer, redis_process, wait_for
from tests.support.releases import LAST_RELEASE, install_last_release, proxy_of

PREFIX = "recorded"
BASE = f"{{{PREFIX}}}:q1:fold1:1:"
FILE = LAST_RELEASE / "queue.json"
WAITING = "waiting"
"""The moment at which pairs wait in several lanes and others are in a claim."""

_FLAGS = (
    *("--model-calls-per-second", "0.5", "--model-rate", "1000", "--model-batch-size", "4"),
    *("--model-deadline", "20s", "--max-wait", "30m", "--key-prefix", PREFIX),
)
_QUOTAS = {
    "callers": {
        "scraper": {"pairs_per_second": 500, "queued_pairs": 5000},
        "indexer": {"pairs_per_second": 500},
    }
}
_POLL_SECONDS = 0.003

Snapshot = dict[str, Any]
"""Key -> value: a dict of strings (hash), a dict of numbers (sorted set), or a list. Bytes are latin-1."""


@dataclass
class Recording:
    """Snapshots by their moment, a value of each shape by key, and the messages of the channel."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {"snapshots": self.snapshots, "values": self.values, "messages": self.messages}
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path = FILE) -> "Recording":
        """Read what was saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def shapes(self) -> set[str]:
        """Return a line for each kind of key, field and value, without what differs between runs.

        Reports for the status page grow with time, so they are left out.
        """
        kept = {key: values for key, values in self.values.items() if ":reports:" not in key}
        return {
            f"{key} {line}" for key, values in kept.items() for value in values for line in _shapes_of(value)
        }


@dataclass
class _Model:
    """Answers by the companies' names. State: `release`, set when slow calls may end, and `_has_failed`."""

    release: threading.Event = field(default_factory=threading.Event)
    _has_failed: bool = False

    def behave(self, call: ReceivedCall) -> Answers:
        """Answer, or fail."""
        names = [company.split()[0] for company, _ in call.pairs]
        if "slow" in names:
            self.release.wait(20)
        if "bad" in names:
            raise AbortCallError(grpc.StatusCode.INVALID_ARGUMENT)
        if "crash" in names:
            raise AbortCallError(grpc.StatusCode.INTERNAL)
        if "down" in names and not self._has_failed:
            self._has_failed = True
            raise AbortCallError(grpc.StatusCode.UNAVAILABLE)
        invalid = {uuid for uuid, name in zip(call.ids, names, strict=True) if name == "invalid"}
        return [(uuid, 99 if uuid in invalid else level) for uuid, level in answer_all(call)]


@dataclass
class _Stage:
    """What the scenario acts on."""

    build: Path
    server: RedisServer
    model: ScriptedModel
    script: _Model
    callers: list[Caller]
    client: "redis.Redis"
    recording: Recording

    def held_pairs(self) -> int:
        """Return how many pairs have not ended."""
        return int(self.client.hlen(f"{BASE}pairs"))

    def take_snapshot(self, name: str) -> None:
        """Keep all that Redis holds now."""
        self.recording.snapshots[name] = _snapshot(self.client)


def record(build: Path, folder: Path) -> Recording:
    """Run the scenario with this build."""
    quotas = folder / "quotas.json"
    quotas.write_text(json.dumps(_QUOTAS), encoding="utf-8")
    script, recording = _Model(), Recording()
    with ExitStack() as stack:
        server = stack.enter_context(redis_process(folder))
        model = stack.enter_context(scripted_model(script.behave))
        flags = (
            "--model-target",
            model.target,
            "--cache-url",
            server.url,
            "--caller-quotas-file",
            str(quotas),
        )
        replicas = [stack.enter_context(proxy_of(build, *flags, *_FLAGS)) for _ in range(2)]
        callers = [stack.enter_context(open_caller(replica.target)) for replica in replicas]
        client = stack.enter_context(server.client())
        stage = _Stage(build, server, model, script, callers, client, recording)
        with _Poller(server, recording).running(), _subscribed(server, recording):
            _play(stage, replicas)
    return recording


def _play(stage: _Stage, replicas: list[ServiceProcess]) -> None:
    one, two = stage.callers
    slow = one.start_infer([("slow 1", "t"), ("slow 2", "t")], metadata=[("x-caller", "pricing")])
    wait_for(lambda: stage.model.calls, description="the slow call")
    waiting = [
        one.start_infer([("both 1", "t"), ("own 2", "t")], metadata=[("x-caller", "pricing")]),
        one.start_infer([("both 1", "t"), ("quota 1", "t")], metadata=[("x-caller", "scraper")]),
        two.start_infer([("quota 1", "t")], metadata=[("x-caller", "indexer")]),
        two.start_infer(
            [("bulk 1", "t"), ("slow 1", "t")], metadata=[("x-caller", "bulk"), ("x-priority", "bulk")]
        ),
        two.start_infer(
            [("own 2", "t"), ("caf\u00e9 \U0001f600", "na\u00efve")], metadata=[("x-caller", "other")]
        ),
    ]
    wait_for(lambda: stage.held_pairs() == 2 + 5, description="all wait")
    stage.take_snapshot(WAITING)
    stage.script.release.set()
    for rpc in (slow, *waiting):
        assert rpc.result().code is grpc.StatusCode.OK
    for _ in range(2):
        one.infer([("invalid 1", "t")])
    rejected = one.start_infer([("bad 1", "t"), ("good 2", "t"), ("good 3", "t")])
    wait_for(lambda: stage.client.llen(f"{BASE}suspects"), description="suspects")
    stage.take_snapshot("suspects")
    rejected.result()
    assert one.infer([("down 1", "t")]).code is grpc.StatusCode.OK
    one.infer([("crash 1", "t"), ("good 4", "t")])
    _invalidate(stage)
    large = [(f"large {number} " + "c" * 3000, "t" * 3000) for number in range(400)]  # in seven chunks
    many = one.start_infer(large, metadata=[("x-caller", "scraper")], timeout_seconds=1000)
    wait_for(lambda: stage.held_pairs() > 380, description="a request of several chunks")
    many.cancel()
    time.sleep(0.5)
    stage.take_snapshot("end")
    assert [replica.process.poll() for replica in replicas] == [None, None]


def _invalidate(stage: _Stage) -> None:
    flags = ("--company", "own 2", "--title", "t", "--cache-url", stage.server.url, "--key-prefix", PREFIX)
    subprocess.run(
        [sys.executable, "-m", "services.cache_proxy", "invalidate", *flags],
        check=True,
        capture_output=True,
        cwd=stage.build,
        env=clean_environment() | {"PYTHONPATH": str(stage.build)},
    )


def load(snapshot: Snapshot, client: "redis.Redis") -> None:
    """Put the queue's part of a snapshot into an empty Redis, as if it had been taken just now."""
    seconds, microseconds = client.time()
    then = max(snapshot[f"{{{PREFIX}}}:limit:replicas"].values())
    later = seconds * 1000 + microseconds // 1000 - round(then)
    for recorded_key, value in snapshot.items():
        name, key = _key_name(recorded_key), _in_this_period(recorded_key, seconds)
        if not key.startswith(f"{{{PREFIX}}}"):
            continue
        if isinstance(value, list):
            client.rpush(key, *(_bytes(item) for item in value))
        elif _is_sorted_set(value):
            shift = 0 if ":lane:" in name else later
            client.zadd(key, {_bytes(member): score + shift for member, score in value.items()})
        else:
            shifted: dict[Any, Any] = {
                _bytes(name_of): _later(name, name_of, text, later) for name_of, text in value.items()
            }
            client.hset(key, mapping=shifted)


_PERIOD = re.compile(r"\b(recent|refused|broke|nonsense|reports):\d+$")
_TIMES = {
    "answered_at",
    "at",
    "backoff_until",
    "calls_after",
    "calls_before",
    "calls_tat",
    "failed_at",
    "failing_at",
    "failing_since",
    "lease_until",
    "not_before",
    "pairs_after",
    "pairs_before",
    "pairs_tat",
    "pushback_until",
    "quotas_since",
    "send_at",
    "slot_at",
}


def _in_this_period(key: str, seconds: int) -> str:
    def period(found: re.Match[str]) -> str:
        return f"{found[1]}:{seconds // (600 if found[1] == 'refused' else 60)}"

    return _PERIOD.sub(period, key)


def _later(name: str, field_name: str, text: str, later: int) -> bytes:
    value = _bytes(text)
    if name.endswith((":pairs", ":claims")):
        packed = msgpack.unpackb(value, raw=True, strict_map_key=False)
        packed = {name: item + later if name.decode() in _TIMES else item for name, item in packed.items()}
        if b"interest" in packed:
            packed[b"interest"] = {replica: until + later for replica, until in packed[b"interest"].items()}
        return bytes(msgpack.packb(packed, use_bin_type=False))
    if field_name in _TIMES:
        return str(float(value) + later).encode()
    if name.endswith(":quotas"):
        rate, _, seen = value.rpartition(b":")
        return b"%s:%d" % (rate, int(seen) + later)
    return value


def _is_sorted_set(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, float) for item in value.values())


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")


def _text(value: bytes) -> str:
    return value.decode("latin-1")


def _texts(stored: Any) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in stored.items()}


def _snapshot(client: "redis.Redis") -> Snapshot:
    values = {key: _value(client, key) for key in client.scan_iter("*", count=1000)}
    return {_text(key): value for key, value in sorted(values.items()) if value}


def _value(client: "redis.Redis", key: bytes) -> Any:
    kind: Any = client.type(key)
    try:
        if kind == b"hash":
            return _texts(client.hgetall(key))
        if kind == b"list":
            items: Any = client.lrange(key, 0, -1)
            return [_text(item) for item in items]
        if kind == b"zset":
            scores: Any = client.zrange(key, 0, -1, withscores=True)
            return {_text(member): score for member, score in scores}
    except redis.ResponseError:  # it ended meanwhile, and began again with another type
        pass
    return None


class _Poller:
    """Keeps a value of each shape. State: `_known`, of two threads that never see the same key."""

    def __init__(self, server: RedisServer, recording: Recording) -> None:
        self._server = server
        self._recording = recording
        self._over = threading.Event()
        self._known: set[str] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Poll for as long as the block lasts."""
        threads = [threading.Thread(target=work) for work in (self._poll, self._poll_reserved)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _poll(self) -> None:
        with self._server.client() as client:
            while not self._over.wait(_POLL_SECONDS):
                for key, value in _snapshot(client).items():
                    self._keep(key, value)

    def _poll_reserved(self) -> None:
        """Look at what lives only between two chunks of a request."""
        key = f"{BASE}reserved"
        with self._server.client() as client:
            while not self._over.is_set():
                reserved = client.hgetall(key)
                if reserved:
                    self._keep(key, _texts(reserved))

    def _keep(self, key: str, value: Any) -> None:
        name = _key_name(key)
        new = {f"{name} {line}" for line in _shapes_of(value)} - self._known
        if new and ":c2:" not in key:
            self._known.update(new)
            self._recording.values.setdefault(name, []).append(_one_of_each_shape(value))


def _one_of_each_shape(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    seen: set[str] = set()
    for name, item in value.items():
        lines = set(_shapes_of({name: item}))
        if not lines <= seen:
            seen |= lines
            kept[name] = item
    return kept


@contextmanager
def _subscribed(server: RedisServer, recording: Recording) -> Iterator[None]:
    """Keep every message of the queue's channel."""
    with server.client() as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(f"{BASE}ended")
        pubsub.get_message(timeout=1)  # the confirmation
        yield
        while (message := pubsub.get_message(timeout=0.2)) is not None:
            recording.messages.append(_text(message["data"]))


_VARYING = (
    (re.compile(r"(model:)[0-9a-f]{16}"), r"\1TARGET"),
    (re.compile(r"(granted:|check:)[0-9a-f]{16}"), r"\1REPLICA"),
    (re.compile(r"\b(scraper|indexer)\b"), "ACCOUNT"),
    (re.compile(r"\b(virtual:).*"), r"\1LANE"),
    (_PERIOD, r"\1:PERIOD"),
)
_REPLICA, _REPLICA_NUMBER = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{16}\.\d+")
_NUMBER = re.compile(rb"-?\d+(\.\d+)?(e[+-]?\d+)?")
_DIGEST_BYTES = 16


def _key_name(key: str) -> str:
    """Return a key or field without what differs from run to run."""
    for pattern, name in _VARYING:
        key = pattern.sub(name, key)
    return key


def _shapes_of(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        yield from (f"item {line}" for item in value for line in _kinds(_bytes(item)))
    elif _is_sorted_set(value):
        yield from (f"member {_field_name(member)}" for member in value)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (f"field {_field_name(name)} {line}" for line in _kinds(_bytes(item)))


def _field_name(name: str) -> str:
    if _REPLICA.fullmatch(name):
        return "REPLICA"
    if _REPLICA_NUMBER.fullmatch(name):
        return "REPLICA.NUMBER"
    return "DIGEST" if len(name) == _DIGEST_BYTES and not name.isidentifier() else _key_name(name)


def _kinds(value: bytes) -> list[str]:
    """Return what a value is: a number, bytes, a packed list by its types, or the fields of a record."""
    if _NUMBER.fullmatch(value):
        return ["number"]
    try:
        packed = msgpack.unpackb(value, raw=True, strict_map_key=False)
    except (ValueError, msgpack.UnpackException):
        return ["bytes"]
    if isinstance(packed, dict):
        return [f"{_text(name)}: {_type(item)}" for name, item in packed.items()]
    return [f"packed {_type(packed)}" if isinstance(packed, list) else "bytes"]


def _type(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "flag"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, bytes):
        return "text"
    if isinstance(value, dict):
        return "{" + ", ".join(sorted({_type(item) for item in value.values()})) + "}"
    return "[" + ", ".join(map(_type, value)) + "]"


def main() -> None:
    """Record the last release."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "redis"
        folder.mkdir()
        record(install_last_release(Path(name) / "build"), folder).save(FILE)


if __name__ == "__main__":
    main()
