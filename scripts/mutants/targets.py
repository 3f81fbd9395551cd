"""Which tests must notice a change of which file."""

from dataclasses import dataclass

_QUEUE_TESTS = (
    "tests/cache_proxy/test_joined_pairs.py",
    "tests/cache_proxy/test_queue_protocol.py",
    "tests/cache_proxy/test_redis_queue_races.py",
    "tests/cache_proxy/test_redis_queue_limit.py",
    "tests/cache_proxy/test_redis_queue_liveness.py",
    "tests/cache_proxy/test_redis_queue_quotas.py",
    "tests/cache_proxy/test_quota_protocol.py",
    "tests/cache_proxy/test_redis_queue_garbage.py",
)
_STORE_TESTS = ("tests/cache_proxy/test_store.py", "tests/cache_proxy/test_deployment.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A source file, and the tests that are run against each of its mutants, the quickest first."""

    path: str
    tests: tuple[str, ...]


PYTHON = (
    Target(path="services/cache_proxy/cache/key.py", tests=("tests/cache_proxy/test_key.py",)),
    Target(
        path="services/cache_proxy/cache/entry.py",
        tests=("tests/cache_proxy/test_dated.py", "tests/cache_proxy/test_store_clock.py"),
    ),
    Target(
        path="services/cache_proxy/cache/store_clock.py", tests=("tests/cache_proxy/test_store_clock.py",)
    ),
    Target(
        path="services/cache_proxy/queue/waiting_pairs.py", tests=("tests/cache_proxy/test_joined_pairs.py",)
    ),
    Target(
        path="services/cache_proxy/wire/batches.py",
        tests=("tests/cache_proxy/test_wire.py", "tests/cache_proxy/test_hits.py", "tests/fuzz/test_wire.py"),
    ),
    Target(
        path="services/cache_proxy/cache/l1.py",
        tests=("tests/cache_proxy/test_l1.py", "tests/cache_proxy/test_invalidation.py"),
    ),
    Target(path="services/cache_proxy/cache/slru.py", tests=("tests/cache_proxy/test_segmented.py",)),
    Target(path="services/cache_proxy/queue/local/gcra.py", tests=("tests/cache_proxy/test_gcra.py",)),
    Target(
        path="services/cache_proxy/queue/local/call_limiter.py",
        tests=("tests/cache_proxy/test_gcra.py", "tests/cache_proxy/test_local_queue.py"),
    ),
    Target(
        path="services/cache_proxy/model/dispatcher.py",
        tests=("tests/cache_proxy/test_dispatcher.py",),
    ),
    Target(
        path="services/augmenter/pipeline/splice.py",
        tests=("tests/augmenter/test_splice.py", "tests/augmenter/test_window.py"),
    ),
    Target(
        path="services/augmenter/pipeline/jsonl.py",
        tests=("tests/augmenter/test_jsonl.py", "tests/augmenter/test_window.py", "tests/fuzz/test_lines.py"),
    ),
    Target(
        path="services/augmenter/stats.py",
        tests=("tests/augmenter/test_accounting.py", "tests/augmenter/test_run_local.py"),
    ),
    Target(
        path="services/common/storage/s3_upload.py",
        tests=("tests/augmenter/test_s3_servers.py", "tests/augmenter/test_s3_faults.py"),
    ),
    Target(
        path="services/common/storage/s3_download.py",
        tests=("tests/augmenter/test_s3_servers.py", "tests/augmenter/test_s3_faults.py"),
    ),
    Target(
        path="services/common/storage/s3_listing.py",
        tests=("tests/augmenter/test_s3_listing.py", "tests/augmenter/test_s3_servers.py"),
    ),
)
LUA = (
    *(
        Target(path=f"services/cache_proxy/queue/lua/{name}.lua", tests=_QUEUE_TESTS)
        for name in (
            "claim", "configure", "enqueue", "fail", "fulfil", "heartbeat", "late", "leave", "prelude",
            "put_back", "refuse", "repair", "verdict",
        )
    ),
    *(
        Target(path=f"services/cache_proxy/cache/lua/{name}.lua", tests=_STORE_TESTS)
        for name in ("get", "put", "forget", "sweep", "clear", "layout", "writing")
    ),
)  # fmt: skip
