"""An audit passes only what was looked up and has nothing known against it."""

from typing import Any

import pytest

from scripts.audit import find_problems

_CLEAN = {"name": "a", "version": "1", "vulns": []}
_KNOWN = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
_SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"dependencies": [_CLEAN, _CLEAN]}, []),
        ({"dependencies": [_CLEAN, _KNOWN]}, ["VULNERABLE b 2: CVE-1, mended in 3"]),
        ({"dependencies": [_CLEAN, _SKIPPED]}, ["NOT AUDITED 1 of 2 packages"]),
        ({"dependencies": [_KNOWN, _SKIPPED]}, ["VULNERABLE b 2", "NOT AUDITED 1 of 2 packages"]),
        ({"dependencies": [_CLEAN]}, ["NOT AUDITED 1 of 2 packages"]),
        (None, ["NOT AUDITED 2 of 2 packages"]),
    ],
    ids=["clean", "known", "skipped", "both", "left out", "no report"],
)
def test_package_without_advisory_lookup_fails_audit(report: Any, expected: list[str]) -> None:
    """What the service did not answer for is named as not audited, whatever pip-audit's exit code."""
    found = list(find_problems(report, expected=2))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
