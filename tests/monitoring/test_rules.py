"""The alerts: each has instructions, and tests that it fires and stays quiet."""

import re
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from scripts.metrics import describe_metrics
from tests.monitoring.queries import RULES, RULES_TEST
from tests.monitoring.test_dashboards import metric_names
from tests.support.processes import ROOT


@cache
def load_alerts() -> dict[str, dict[str, Any]]:
    """Return all alerts by name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.mark.slow
def test_promtool_cases_pass() -> None:
    """Each alert fires in one case and stays quiet in the other."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool is installed")
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES_TEST)]):
        completed = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stdout + completed.stderr


@pytest.mark.parametrize("name", load_alerts())
def test_alert_has_severity_description_and_runbook(name: str) -> None:
    """And a comment with the reason for its delay."""
    rule = load_alerts()[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    text = RULES.read_text(encoding="utf-8").partition(f"- alert: {name}\n")[2]
    assert re.search(r"^        for: \w+ # \S+", text.partition("annotations:")[0], re.MULTILINE)


def test_runbook_headings_are_the_alerts() -> None:
    """In the same order."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("\n## Runbook\n")[2]
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == list(load_alerts())


@pytest.mark.parametrize("name", load_alerts())
def test_alert_has_firing_and_quiet_case(name: str) -> None:
    """The samples of `fires` name the alert, `is quiet` expects none."""
    cases = yaml.safe_load(RULES_TEST.read_text(encoding="utf-8"))["tests"]
    fires = [case for case in cases if case["name"].startswith(f"{name} fires")]
    quiet = [case for case in cases if case["name"].startswith(f"{name} is quiet")]
    assert fires
    assert quiet
    for case in fires + quiet:
        for query in case["promql_expr_test"]:
            assert f'alertname="{name}"' in query["expr"]
            assert bool(query.get("exp_samples")) == (case in fires)


@pytest.mark.parametrize("name", load_alerts())
def test_alert_reads_existing_metrics(name: str) -> None:
    """Metrics of this project, or `up`, and nothing that hides missing data."""
    expr = load_alerts()[name]["expr"]
    assert metric_names(expr) <= {metric.name for metric in describe_metrics()}
    assert metric_names(expr) or expr.startswith("up{")
    assert "vector(" not in expr
