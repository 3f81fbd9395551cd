"""Write an SBOM (CycloneDX) of each lock, and check its packages for known vulnerabilities (pip-audit).

The SBOMs need nothing but the locks. Advisories come from a service. A package that it did not answer for
counts as not audited and fails, as a vulnerable one does: pip-audit itself passes what it could not look up.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent
_SHOWN = 5


def main() -> int:
    """Return 1 unless every package of every lock was looked up, and nothing is known against any."""
    folder = _ROOT / ".audit"
    folder.mkdir(exist_ok=True)
    bad: list[str] = []
    for lock in sorted((_ROOT / "requirements").glob("*.txt")):
        parts = _write_sbom(lock, folder / f"{lock.stem}.cdx.json")
        print(f"{lock.name}: {parts} packages, listed in .audit/{lock.stem}.cdx.json")
        problems = list(find_problems(_advisories(lock), expected=parts))
        for problem in problems:
            print(f"  {problem}")
        bad += problems
    print("audit: NOT PASSED, see above" if bad else "audit: nothing is known against any package")
    return 1 if bad else 0


def find_problems(report: Any, *, expected: int) -> Iterable[str]:
    """Yield the problems in a report of pip-audit (parsed JSON). None: there is no report."""
    found = [] if report is None else report["dependencies"]
    for one in found:
        for known in one.get("vulns", ()):
            fixed = ", ".join(known.get("fix_versions", ())) or "no version yet"
            yield f"VULNERABLE {one['name']} {one['version']}: {known['id']}, mended in {fixed}"
    missed = [one["name"] for one in found if "vulns" not in one]
    count = expected - sum("vulns" in one for one in found)
    if count > 0:
        names = ", ".join(missed[:_SHOWN]) + (", …" if len(missed) > _SHOWN else "")
        yield f"NOT AUDITED {count} of {expected} packages: the service did not answer for them {names}"


def _write_sbom(lock: Path, path: Path) -> int:
    command: list[str | Path] = [
        _BIN / "cyclonedx-py",
        "requirements",
        lock,
        "--output-reproducible",
        "--output-file",
        path,
    ]
    subprocess.run(command, check=True)
    return len(json.loads(path.read_text(encoding="utf-8"))["components"])


def _advisories(lock: Path) -> Any:
    command: list[str | Path] = [
        _BIN / "pip-audit",
        "--require-hashes",
        "--disable-pip",
        "--requirement",
        lock,
        "--progress-spinner",
        "off",
        "--format",
        "json",
    ]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        return json.loads(ended.stdout)
    except ValueError:
        print(f"  pip-audit: {(ended.stderr.strip() or 'no output').splitlines()[-1]}")
        return None


if __name__ == "__main__":
    sys.exit(main())
