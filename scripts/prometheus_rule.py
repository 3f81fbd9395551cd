"""Generate the PrometheusRule of `deploy/k8s` from the plain rules, or check that it is up to date."""

import argparse
import sys
from pathlib import Path

import yaml

_DEPLOY = Path(__file__).parents[1] / "deploy"
_OUTPUT = "k8s/components/monitoring/prometheusrule.yaml"


def main(deploy: Path = _DEPLOY) -> int:
    """Return 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    made = render((deploy / "prometheus" / "rules.yaml").read_text(encoding="utf-8"))
    path = deploy / _OUTPUT
    if not parser.parse_args().check:
        path.write_text(made, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == made:
        return 0
    print(f"deploy/{_OUTPUT} is not what deploy/prometheus/rules.yaml gives; run: make k8s-rules")
    return 1


def render(rules: str) -> str:
    """Return the custom resource with the same groups."""
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "seniority-cache"},
        "spec": {"groups": yaml.safe_load(rules)["groups"]},
    }
    heading = "# Made of deploy/prometheus/rules.yaml by `make k8s-rules`: edit that.\n"
    made: str = yaml.safe_dump(resource, sort_keys=False, width=110, allow_unicode=True)
    return heading + made


if __name__ == "__main__":
    sys.exit(main())
