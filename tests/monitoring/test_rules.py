"""The alerts: each says what to do, and is proven to fire and to be quiet."""

import re
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from scripts.metrics import describe_metrics
from tests.monitoring.queries import RULES, RULES_TEST
from tests.monitoring.test_dashboards import names_in
from tests.support.processes import ROOT


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """All alerts by name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.mark.slow
def test_promtools_cases_hold() -> None:
    """Each alert fires in its one case, and not in the other."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool is installed")
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES_TEST)]):
        ended = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", alerts())
def test_an_alert_tells_whom_it_wakes_and_what_to_do(name: str) -> None:
    """Severity, summary, description, a runbook under its own name, and why it waits as long as it does."""
    rule = alerts()[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    text = RULES.read_text(encoding="utf-8").partition(f"- alert: {name}\n")[2]
    assert re.search(r"^        for: \w+ # \S+", text.partition("annotations:")[0], re.MULTILINE)


def test_every_alert_has_a_runbook_and_nothing_else_has() -> None:
    """The headings that the links lead to are the alerts' names, in their order."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("\n## Runbook\n")[2]
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == list(alerts())


@pytest.mark.parametrize("name", alerts())
def test_an_alert_has_a_case_of_each_kind(name: str) -> None:
    """`fires`, whose samples name it, and `is quiet`, which expects none."""
    cases = yaml.safe_load(RULES_TEST.read_text(encoding="utf-8"))["tests"]
    fires = [case for case in cases if case["name"].startswith(f"{name} fires")]
    quiet = [case for case in cases if case["name"].startswith(f"{name} is quiet")]
    assert fires
    assert quiet
    for case in fires + quiet:
        for query in case["promql_expr_test"]:
            assert f'alertname="{name}"' in query["expr"]
            assert bool(query.get("exp_samples")) == (case in fires)


@pytest.mark.parametrize("name", alerts())
def test_an_alert_reads_metrics_that_exist(name: str) -> None:
    """Ours as the code has them, or `up`; and nothing that hides missing data."""
    expr = alerts()[name]["expr"]
    assert names_in(expr) <= {metric.name for metric in describe_metrics()}
    assert names_in(expr) or expr.startswith("up{")
    assert "vector(" not in expr
