"""Every query of the committed dashboards, and every alert."""

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
    """A panel's query: `place` names dashboard, panel and query."""

    dashboard: str
    panel: str
    ref: str
    expr: str

    @property
    def location(self) -> str:
        """For people."""
        return f"{self.dashboard}: {self.panel}: {self.ref}"


@cache
def dashboard(path: Path) -> dict[str, Any]:
    """A dashboard as it is imported."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def panels(path: Path) -> list[dict[str, Any]]:
    """Its panels, rows aside."""
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(path.stem, panel["title"], target["refId"], target["expr"])
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]
