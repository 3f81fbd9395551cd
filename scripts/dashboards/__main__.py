"""Generate the dashboards in `deploy/grafana/`, or check that the committed ones are up to date."""

import argparse
import json
import sys
from pathlib import Path

from scripts.dashboards import augmenter, caller, operator

_FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
_DASHBOARDS = {
    "operator.json": operator.DASHBOARD,
    "caller.json": caller.DASHBOARD,
    "augmenter.json": augmenter.DASHBOARD,
}


def main() -> int:
    """Return 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    stale = 0
    for name, dashboard in _DASHBOARDS.items():
        path = _FOLDER / name
        made = json.dumps(dashboard.to_json(), indent=2, ensure_ascii=False) + "\n"
        if not check:
            path.write_text(made, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != made:
            print(f"deploy/grafana/{name} is not what scripts/dashboards gives; run: make monitoring")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
