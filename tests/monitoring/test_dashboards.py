"""The dashboards can be imported unchanged, and explain themselves."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.metrics import describe_metrics
from tests.monitoring.queries import DASHBOARDS, dashboard_queries, load_dashboard, panels

_TYPES = Path(__file__).parent / "grafana"
_METRIC = re.compile(r"\b(?:cache_proxy|augmenter)_\w+")
_FLEET_WIDE = re.compile(
    r"cache_proxy_(?:queue_global|queue_oldest|live_replicas|limit|store_evicts|quota_held)\w*"
)


def metric_names(expr: str) -> set[str]:
    """Return the metrics of this project that an expression reads.

    The suffixes of histograms are removed.
    """
    known = {metric.name for metric in describe_metrics()}
    names = set(_METRIC.findall(expr))
    return {name if name in known else re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.slow
def test_dashboards_match_types_of_grafana(tmp_path: Path) -> None:
    """Grafana's own types know every field of dashboards and panel options, and its values."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm is installed")
    folder = tmp_path / "types"
    shutil.copytree(_TYPES, folder)
    subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    for path in DASHBOARDS:
        content = json.dumps(load_dashboard(path), indent=2)
        (folder / f"{path.stem}.ts").write_text(
            f"import type {{ OurDashboard }} from './dashboard.js';\n\n"
            f"export const made = {content} satisfies OurDashboard;\n"
        )
    compiler = folder / "node_modules" / ".bin" / "tsc"
    completed = subprocess.run([compiler, "-p", "."], cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_use_data_source_variable(path: Path) -> None:
    """They contain no uid of a specific Grafana."""
    loaded = load_dashboard(path)
    assert "uid" not in loaded
    assert [one["name"] for one in loaded["templating"]["list"]][:3] == ["datasource", "namespace", "job"]
    uids = re.findall(r'"uid": "([^"]*)"', path.read_text(encoding="utf-8"))
    assert set(uids) == {"${datasource}"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_are_described_and_do_not_overlap(path: Path) -> None:
    """Each has a unique title, a description and a unit, and stays within the grid."""
    shown = panels(path)
    occupied: set[tuple[int, int]] = set()
    for panel in load_dashboard(path)["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert grid["x"] + grid["w"] <= 24
        assert not cells & occupied, panel["title"]
        occupied |= cells
    for panel in shown:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["title"] for panel in shown}) == len(shown)
    assert len({panel["id"] for panel in load_dashboard(path)["panels"]}) == len(
        load_dashboard(path)["panels"]
    )


def test_queries_read_existing_metrics() -> None:
    """Each reads at least one metric of this project or of the process, and no unknown one."""
    known = {metric.name for metric in describe_metrics()}
    for query in dashboard_queries():
        names = metric_names(query.expr)
        assert names <= known, query.location
        assert names or "process_" in query.expr, query.location
        assert 'namespace=~"$namespace",job=~"$job"' in query.expr, query.location


def test_fleet_wide_metrics_are_read_with_max() -> None:
    """A sum would count them once for each replica. Nothing hides missing data."""
    for query in dashboard_queries():
        assert "vector(" not in query.expr, query.location
        for found in _FLEET_WIDE.finditer(query.expr):
            before = query.expr[: found.start()]
            assert re.search(r"max(?: by \(\w+\) )?\($", before), query.location


def test_every_metric_is_shown_on_a_dashboard() -> None:
    """A metric that no panel shows is easily overlooked."""
    shown = set().union(*(metric_names(query.expr) for query in dashboard_queries()))
    not_shown = {metric.name for metric in describe_metrics()} - shown
    # `cache_proxy_degraded` covers it, and the loss of the shared queue too.
    assert not_shown == {"cache_proxy_store_up"}
