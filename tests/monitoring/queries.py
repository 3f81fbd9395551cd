"""Every query of the dashboards in the repository."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES_TEST = ROOT / "deploy" / "prometheus" / "rules_test.yaml"


@dataclass(frozen=True, slots=True)
class Query:
    """A query of a panel."""

    dashboard: str
    panel: str
    ref: str
    expr: str

    @property
    def location(self) -> str:
        """Return dashboard, panel and query for messages."""
        return f"{self.dashboard}: {self.panel}: {self.ref}"


@cache
def load_dashboard(path: Path) -> dict[str, Any]:
    """Load a dashboard."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def panels(path: Path) -> list[dict[str, Any]]:
    """Return the panels of a dashboard without its rows."""
    return [panel for panel in load_dashboard(path)["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Return every query of every panel."""
    return [
        Query(path.stem, panel["title"], target["refId"], target["expr"])
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]
