"""Generate `docs/metrics.md` from the metrics in the code, or check that it is up to date."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.augmenter.metrics import Metrics
from services.cache_proxy.observability.metrics import ProxyMetrics

_DOC = Path(__file__).parents[1] / "docs" / "metrics.md"
_LABEL_DESCRIPTIONS = {
    "code": "a gRPC status",
    "caller": "a name",
    "op": "a script",
    "version": "of the project",
}
_HEAD = """\
# Metrics

Made from the code by `scripts/metrics.py`; `make lint` notices when it has drifted. Both services answer
`/metrics` on `--http-listen`: the proxy by default on port 9464, the augmenter only where it is given. A
histogram has `_bucket`, `_sum` and `_count`; the proxy has `process_*` and `python_*` besides.

- What is told of all replicas is read with `max`, never with `sum`: each of them tells it.
- Every pair is in exactly one `outcome`; so is every line, and every file.
- Series are there from the start, with 0, unless their labels are callers or operations of the store.
"""


@dataclass(frozen=True, slots=True)
class MetricDescription:
    """What the page shows of a metric. `labels` holds the values of each label."""

    name: str
    kind: str
    labels: dict[str, set[str]]
    meaning: str
    reading: str


def describe_metrics() -> list[MetricDescription]:
    """Return every metric of both services."""
    registry = CollectorRegistry()
    proxy = ProxyMetrics(registry)
    proxy.store_duration.labels("get")
    proxy.rpcs.count(code="OK", seconds=0, caller="c", outcomes={"l1": 1, "inferred": 1, "failed": 1})
    for quota in ("pairs_per_second", "queued_pairs"):
        proxy.rpcs.count_quota_rejection(account="c", quota=quota)
    Metrics(registry)
    return list(_describe_families(registry))


def _describe_families(registry: CollectorRegistry) -> Iterator[MetricDescription]:
    for family in registry.collect():
        labels: dict[str, set[str]] = {}
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        if not samples:
            message = f"{family.name} has no series yet, so its labels are not known: give it one"
            raise AssertionError(message)
        for sample in samples:
            for label, value in sample.labels.items():
                if label != "le":
                    labels.setdefault(label, set()).add(value)
        name = family.name + ("_total" if family.type == "counter" else "")
        meaning, _, reading = family.documentation.partition(". ")
        yield MetricDescription(name, family.type, labels, meaning.rstrip("."), reading)


def render_page(metrics: list[MetricDescription]) -> str:
    """Return the page."""
    parts = [_HEAD]
    for title, prefix in (("The proxy", "cache_proxy_"), ("The augmenter", "augmenter_")):
        rows = [_row(metric) for metric in metrics if metric.name.startswith(prefix)]
        head = "| name | type | labels | what it tells | how to read it |\n|---|---|---|---|---|\n"
        parts.append(f"## {title}\n\n{head}{''.join(rows)}")
    return "\n".join(parts)


def _row(metric: MetricDescription) -> str:
    labels = "; ".join(_label(*label) for label in metric.labels.items())
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} | {metric.reading} |\n"


def _label(name: str, values: set[str]) -> str:
    return f"`{name}`: " + (
        _LABEL_DESCRIPTIONS.get(name) or ", ".join(f"`{value}`" for value in sorted(values))
    )


def main() -> int:
    """Return 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    made = render_page(describe_metrics())
    if not check:
        _DOC.write_text(made, encoding="utf-8")
    elif not _DOC.exists() or _DOC.read_text(encoding="utf-8") != made:
        print("docs/metrics.md is not what the code gives; run: make monitoring")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
