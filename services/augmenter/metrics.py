"""What the augmenter counts."""

from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FILE_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_RPC_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The `augmenter_*` metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.files = Counter("augmenter_files", "Files, by how they ended.", ["outcome"], registry=registry)
        self.lines = Counter(
            "augmenter_lines", "Lines of files that are done, by what became of them.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.file_seconds = Histogram(
            "augmenter_file_duration_seconds", "From the first look at a file to its completed output.",
            buckets=_FILE_SECONDS, registry=registry,
        )  # fmt: skip
        self.rpc_seconds = Histogram(
            "augmenter_rpc_duration_seconds", "One RPC, however it ended.",
            buckets=_RPC_SECONDS, registry=registry,
        )  # fmt: skip
        self.backlog = Gauge("augmenter_backlog_files", "Files found and not yet ended.", registry=registry)
        build = Gauge("augmenter_build_info", "Always 1.", ["version"], registry=registry)
        build.labels(version=_version()).set(1)
        for outcome in ("done", "skipped", "failed"):
            self.files.labels(outcome=outcome)
        for outcome in ("augmented", "rejected", "blank"):
            self.lines.labels(outcome=outcome)


def _version() -> str:
    try:
        return metadata.version("seniority-cache")
    except metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "unknown"
