"""Prometheus metrics of the augmenter.

The first sentence of a help text states what is counted, the rest how to read it. `docs/metrics.md` is
generated from both.
"""

from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FILE_DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_RPC_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The `augmenter_*` metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.files = Counter(
            "augmenter_files",
            "Files, by how they ended. `skipped`: the output was there already, or the object is in cold "
            "storage, or gone (`--missing-input skip`); `failed` ones are tried again by `--watch` and by "
            "the queue.",
            ["outcome"],
            registry=registry,
        )
        self.lines = Counter(
            "augmenter_lines",
            "Lines of files that are done, by what became of them. Each in one outcome: their sum is the "
            "lines of the input.",
            ["outcome"],
            registry=registry,
        )
        self.existing_levels = Counter(
            "augmenter_existing_levels",
            "Lines of files that are done which had a level before, by what became of it. Both are among the "
            "augmented lines; `kept` ones, of `--keep-existing`, are written as they were.",
            ["outcome"],
            registry=registry,
        )
        self.file_seconds = Histogram(
            "augmenter_file_duration_seconds",
            "How long a file took, from the first look to its end. Failed and skipped ones count too.",
            buckets=_FILE_DURATION_BUCKETS,
            registry=registry,
        )
        self.rpc_seconds = Histogram(
            "augmenter_rpc_duration_seconds",
            "How long an RPC to the proxy took, however it ended. Near `--deadline`, files begin to wait.",
            buckets=_RPC_DURATION_BUCKETS,
            registry=registry,
        )
        self.backlog = Gauge(
            "augmenter_backlog_files",
            "Files found and not yet ended. At most 10,000 are known ahead. With `--sqs-queue-url` it is 0: "
            "the queue's own depth is the backlog.",
            registry=registry,
        )
        self.archived_files = Counter(
            "augmenter_archived_files",
            "Files skipped because their object is in cold storage and not restored. They are among "
            '`augmenter_files_total{outcome="skipped"}`.',
            registry=registry,
        )
        self.queue_messages = Counter(
            "augmenter_queue_messages",
            "Messages of the queue, by outcome. `outside` (not about INPUT) and `not_understood` stay in the "
            "queue and are counted once; `failed` ones come back.",
            ["outcome"],
            registry=registry,
        )
        build = Gauge(
            "augmenter_build_info",
            "Always 1. One series a process: count them by `version`.",
            ["version"],
            registry=registry,
        )
        build.labels(version=_version()).set(1)
        for outcome in ("done", "skipped", "failed"):
            self.files.labels(outcome=outcome)
        for outcome in ("augmented", "rejected", "blank"):
            self.lines.labels(outcome=outcome)
        for outcome in ("replaced", "kept"):
            self.existing_levels.labels(outcome=outcome)
        for outcome in ("deleted", "failed", "outside", "not_understood"):
            self.queue_messages.labels(outcome=outcome)


def _version() -> str:
    try:
        return metadata.version("seniority-cache")
    except metadata.PackageNotFoundError:
        # The service runs from a source tree that is not installed.
        return "unknown"
