"""Panels, rows and dashboards, and their JSON for Grafana."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

SCOPE = 'namespace=~"$namespace",job=~"$job"'
"""The matchers of every query: the deployments that the viewer selected."""

GOOD = "green"
WARN = "yellow"
BAD = "red"
_WIDTH = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_LINES = {
    "drawStyle": "line",
    "lineInterpolation": "linear",
    "lineWidth": 1,
    "fillOpacity": 10,
    "showPoints": "never",
    "spanNulls": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """An expression and the legend of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A panel. `steps`: the colour from each value on; the first step has no value."""

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    steps: Sequence[tuple[float | None, str]] = ((None, GOOD),)
    width: int = 8
    decimals: int | None = None
    max: float | None = None

    def base_json(self, kind: str, style: Json, height: int) -> Json:
        """Return the JSON of the panel without its position."""
        defaults: Json = {
            "unit": self.unit,
            "min": 0,
            "thresholds": {
                "mode": "absolute",
                "steps": [{"color": color, "value": value} for value, color in self.steps],
            },
        } | style["defaults"]
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.max is not None:
            defaults["max"] = self.max
        targets = [
            {
                "refId": chr(ord("A") + at),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                **style["target"],
            }
            for at, query in enumerate(self.queries)
        ]
        return {
            "type": kind,
            "title": self.title,
            "description": self.description,
            "datasource": _DATASOURCE,
            "gridPos": {"h": height, "w": self.width, "x": 0, "y": 0},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": style["options"],
            "targets": targets,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat(Panel):
    """One number, or one for each series."""

    width: int = 4

    def to_json(self) -> Json:
        """Return the JSON of the panel."""
        text = "value_and_name" if any(query.legend for query in self.queries) else "value"
        options = {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "showPercentChange": False,
            "textMode": text,
            "wideLayout": True,
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
        defaults = {"color": {"mode": "thresholds"}}
        look = {"defaults": defaults, "options": options, "target": {"instant": True, "range": False}}
        return self.base_json("stat", look, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series(Panel):
    """Lines over time; `stacked` where they add up. Steps with a value are drawn as lines."""

    stacked: bool = False

    def to_json(self) -> Json:
        """Return the JSON of the panel."""
        custom: Json = dict(_LINES)
        if self.stacked:
            custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
        if len(self.steps) > 1:
            custom["thresholdsStyle"] = {"mode": "dashed"}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        defaults = {"color": {"mode": "palette-classic"}, "custom": custom}
        look = {"defaults": defaults, "options": options, "target": {"instant": False, "range": True}}
        return self.base_json("timeseries", look, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Panels under a heading, from left to right, in as many lines as they fill."""

    title: str
    panels: Sequence[Stat | Series]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    """`of` is the metric by which deployments are found; `callers`: whether one is chosen by caller too."""

    title: str
    description: str
    discovery_metric: str
    rows: Sequence[Row] = field(default_factory=list)
    has_caller_variable: bool = False

    def to_json(self) -> Json:
        """Return the JSON to import. It has no uid: Grafana assigns one, and prompts for the data source."""
        variables: list[Json] = [
            {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
            _variable("namespace", "Namespace", f"label_values({self.discovery_metric}, namespace)"),
            _variable("job", "Job", f'label_values({self.discovery_metric}{{namespace=~"$namespace"}}, job)'),
        ]
        if self.has_caller_variable:
            pairs = f"cache_proxy_caller_pairs_total{{{SCOPE}}}"
            variables.append(_variable("caller", "Caller", f"label_values({pairs}, caller)"))
        return {
            "title": self.title,
            "description": self.description,
            "tags": ["seniority-cache"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Seniority cache",
                    "tags": ["seniority-cache"],
                    "asDropdown": True,
                    "includeVars": False,
                    "keepTime": True,
                    "targetBlank": False,
                    "icon": "external link",
                    "tooltip": "",
                },
            ],
            "templating": {"list": variables},
            "panels": _lay_out(self.rows),
        }


def _variable(name: str, label: str, query: str) -> Json:
    """Return a multi-value variable. Its `.*` also matches series without the label."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _lay_out(rows: Sequence[Row]) -> list[Json]:
    """Return the panels with ids and positions, row by row."""
    placed: list[Json] = []
    y = 0
    for row in rows:
        placed.append(
            {
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": _WIDTH, "x": 0, "y": y},
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            made = panel.to_json()
            if x + panel.width > _WIDTH:
                x, y, height = 0, y + height, 0
            made["gridPos"] |= {"x": x, "y": y}
            x, height = x + panel.width, max(height, made["gridPos"]["h"])
            placed.append(made)
        y += height
    return [{"id": number, **panel} for number, panel in enumerate(placed, start=1)]
