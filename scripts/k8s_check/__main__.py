"""Run every check on every build, print the findings, and exit 1 if there are any."""

import sys
from pathlib import Path

from scripts.k8s_check import build, checks, policy, schemas

_DEPLOY = Path(__file__).parents[2] / "deploy"


def main() -> int:
    """Return 1 if there is a finding."""
    builds = build.all_builds(_DEPLOY)
    found = [
        *schemas.check(builds),
        *policy.check(builds, ignored=_DEPLOY / "k8s" / "trivyignore"),
        *checks.check(builds),
    ]
    for finding in found:
        print(finding)
    objects = sum(map(len, builds.values()))
    needs = "; ".join(sorted(checks.external_secrets(builds["overlays/prod"]))) or "nothing"
    print(f"{len(builds)} builds, {objects} objects, {len(found)} findings.")
    print(f"overlays/prod needs from outside: {needs}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
