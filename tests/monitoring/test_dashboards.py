"""The dashboards: importable as they are, and readable by who has never seen them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.metrics import describe_metrics
from tests.monitoring.queries import DASHBOARDS, dashboard, dashboard_queries, panels

_TYPES = Path(__file__).parent / "grafana"
_METRIC = re.compile(r"\b(?:cache_proxy|augmenter)_\w+")
_OF_ALL_REPLICAS = re.compile(
    r"cache_proxy_(?:queue_global|queue_oldest|live_replicas|limit|store_evicts|quota_held)\w*"
)


def names_in(expr: str) -> set[str]:
    """The metrics of ours that an expression reads, without the suffixes of histograms."""
    told = {metric.name for metric in describe_metrics()}
    names = set(_METRIC.findall(expr))
    return {name if name in told else re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.slow
def test_grafana_takes_them(tmp_path: Path) -> None:
    """Grafana's own types know every field of the dashboards and of their panels' options, and its values."""
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
        made = json.dumps(dashboard(path), indent=2)
        (folder / f"{path.stem}.ts").write_text(
            f"import type {{ OurDashboard }} from './dashboard.js';\n\n"
            f"export const made = {made} satisfies OurDashboard;\n"
        )
    compiler = folder / "node_modules" / ".bin" / "tsc"
    ended = subprocess.run([compiler, "-p", "."], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_they_are_imported_as_they_are(path: Path) -> None:
    """No uid of somebody's Grafana: the data source is a variable that every panel and query uses."""
    whole = dashboard(path)
    assert "uid" not in whole
    assert [one["name"] for one in whole["templating"]["list"]][:3] == ["datasource", "namespace", "job"]
    uids = re.findall(r'"uid": "([^"]*)"', path.read_text(encoding="utf-8"))
    assert set(uids) == {"${datasource}"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_explain_themselves_and_do_not_overlap(path: Path) -> None:
    """Each has a title of its own, a description and a unit; each stands in the grid, and on no other."""
    shown = panels(path)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(path)["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in shown:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["title"] for panel in shown}) == len(shown)
    assert len({panel["id"] for panel in dashboard(path)["panels"]}) == len(dashboard(path)["panels"])


def test_queries_read_metrics_that_exist() -> None:
    """Each names at least one of ours, or of the process's, and none that the code does not have."""
    told = {metric.name for metric in describe_metrics()}
    for query in dashboard_queries():
        names = names_in(query.expr)
        assert names <= told, query.location
        assert names or "process_" in query.expr, query.location
        assert 'namespace=~"$namespace",job=~"$job"' in query.expr, query.location


def test_what_all_replicas_tell_is_read_with_max() -> None:
    """Their sum would be as many times too much as there are replicas; and nothing hides missing data."""
    for query in dashboard_queries():
        assert "vector(" not in query.expr, query.location
        for found in _OF_ALL_REPLICAS.finditer(query.expr):
            before = query.expr[: found.start()]
            assert re.search(r"max(?: by \(\w+\) )?\($", before), query.location


def test_every_metric_is_shown() -> None:
    """A metric that no panel shows is one that nobody will think of."""
    shown = set().union(*(names_in(query.expr) for query in dashboard_queries()))
    rest = {metric.name for metric in describe_metrics()} - shown
    assert rest == {"cache_proxy_store_up"}  # degraded says it, and the shared queue's loss too
