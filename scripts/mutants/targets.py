"""Which tests must notice a change of which file."""

from dataclasses import dataclass

_QUEUE_TESTS = (
    "tests/contract/test_joined_pairs.py",
    "tests/contract/test_queue.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_races.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_claim_scheduling.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_invalidation.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_load.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_rate_limit.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_liveness.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_quotas.py",
    "tests/contract/test_quotas.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_corruption.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_reset.py",
    "tests/unit/cache_proxy/queue/test_redis_queue_membership_corruption.py",
)
_STORE_TESTS = (
    "tests/unit/cache_proxy/cache/test_redis_store.py",
    "tests/unit/cache_proxy/cache/test_redis_store_deletion.py",
    "tests/unit/cache_proxy/cache/test_resilient_store.py",
    "tests/unit/cache_proxy/cache/test_namespace.py",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A source file, and the tests that are run against each of its mutants, the quickest first."""

    path: str
    tests: tuple[str, ...]


PYTHON = (
    Target(path="services/cache_proxy/cache/key.py", tests=("tests/unit/cache_proxy/cache/test_key.py",)),
    Target(
        path="services/cache_proxy/cache/entry.py",
        tests=(
            "tests/unit/cache_proxy/cache/test_entry.py",
            "tests/unit/cache_proxy/cache/test_store_clock.py",
        ),
    ),
    Target(
        path="services/cache_proxy/cache/store_clock.py",
        tests=("tests/unit/cache_proxy/cache/test_store_clock.py",),
    ),
    Target(
        path="services/cache_proxy/queue/waiting_pairs.py", tests=("tests/contract/test_joined_pairs.py",)
    ),
    Target(
        path="services/cache_proxy/wire/batches.py",
        tests=(
            "tests/unit/cache_proxy/wire/test_batches.py",
            "tests/unit/cache_proxy/test_fast_path.py",
            "tests/fuzz/test_wire.py",
        ),
    ),
    Target(
        path="services/cache_proxy/cache/l1.py",
        tests=(
            "tests/unit/cache_proxy/cache/test_l1.py",
            "tests/unit/cache_proxy/cache/test_invalidation.py",
        ),
    ),
    Target(path="services/cache_proxy/cache/slru.py", tests=("tests/unit/cache_proxy/cache/test_slru.py",)),
    Target(
        path="services/cache_proxy/queue/local/gcra.py",
        tests=("tests/unit/cache_proxy/queue/local/test_gcra.py",),
    ),
    Target(
        path="services/cache_proxy/queue/local/call_limiter.py",
        tests=(
            "tests/unit/cache_proxy/queue/local/test_gcra.py",
            "tests/unit/cache_proxy/queue/local/test_local_queue.py",
        ),
    ),
    Target(
        path="services/cache_proxy/model/dispatcher.py",
        tests=("tests/unit/cache_proxy/model/test_dispatcher.py",),
    ),
    Target(
        path="services/augmenter/pipeline/splice.py",
        tests=(
            "tests/unit/augmenter/pipeline/test_splice.py",
            "tests/unit/augmenter/pipeline/test_line_blocks.py",
        ),
    ),
    Target(
        path="services/augmenter/pipeline/jsonl.py",
        tests=(
            "tests/unit/augmenter/pipeline/test_jsonl.py",
            "tests/unit/augmenter/pipeline/test_line_blocks.py",
            "tests/fuzz/test_lines.py",
        ),
    ),
    Target(
        path="services/augmenter/stats.py",
        tests=(
            "tests/unit/augmenter/test_stats.py",
            "tests/integration/augmenter/test_rejected_lines.py",
            "tests/integration/augmenter/test_line_accounting.py",
            "tests/integration/augmenter/test_run_local.py",
        ),
    ),
    Target(
        path="services/common/storage/s3_upload.py",
        tests=(
            "tests/integration/augmenter/test_s3_listing_order.py",
            "tests/integration/augmenter/test_s3_compatibility.py",
            "tests/integration/augmenter/test_s3_faults.py",
        ),
    ),
    Target(
        path="services/common/storage/s3_conditional.py",
        tests=(
            "tests/integration/augmenter/test_s3_compatibility.py",
            "tests/integration/augmenter/test_s3_faults.py",
        ),
    ),
    Target(
        path="services/common/storage/s3_download.py",
        tests=(
            "tests/integration/augmenter/test_s3_compatibility.py",
            "tests/integration/augmenter/test_s3_faults.py",
        ),
    ),
    Target(
        path="services/common/storage/s3_listing.py",
        tests=(
            "tests/unit/common/storage/test_s3_listing.py",
            "tests/integration/augmenter/test_s3_listing_order.py",
        ),
    ),
)
LUA = (
    *(
        Target(path=f"services/cache_proxy/queue/lua/{name}.lua", tests=_QUEUE_TESTS)
        for name in (
            "claim",
            "configure",
            "enqueue",
            "fail",
            "complete",
            "heartbeat",
            "postpone_slot",
            "cancel",
            "prelude",
            "release",
            "reject",
            "reset",
            "set_peer_state",
        )
    ),
    Target(
        path="services/cache_proxy/queue/lua/standby.lua",
        tests=("tests/unit/cache_proxy/queue/test_queue_format.py",),
    ),
    *(
        Target(path=f"services/cache_proxy/cache/lua/{name}.lua", tests=_STORE_TESTS)
        for name in ("get", "put", "delete", "sweep", "clear", "layout", "bucket_writes")
    ),
)
