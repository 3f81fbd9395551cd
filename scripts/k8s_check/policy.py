"""Check the builds with trivy: root user, capabilities, writable file systems, tokens."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from scripts.k8s_check.build import Builds


def check(builds: Builds, *, ignored: Path) -> Iterator[str]:
    """Yield the findings of trivy's built-in checks. `ignored` is the file of exceptions with reasons."""
    with tempfile.TemporaryDirectory() as folder:
        for build, manifests in builds.items():
            path = Path(folder) / f"{build.replace('/', '-')}.yaml"
            path.write_text(yaml.dump_all(manifests, Dumper=yaml.CSafeDumper), encoding="utf-8")
        command = [
            str(Path(sys.executable).parent / "trivy"),
            "config",
            "--skip-check-update",
            "--quiet",
            "--misconfig-scanners",
            "kubernetes",
            "--format",
            "json",
            "--ignorefile",
            str(ignored.resolve()),
            folder,
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    results = json.loads(output).get("Results", [])
    if len(results) != len(builds):
        raise RuntimeError(f"trivy looked at {len(results)} of {len(builds)} builds")
    for result in results:
        for problem in result.get("Misconfigurations", []):
            yield f"{result['Target'].removesuffix('.yaml')}: {problem['ID']}: {problem['Message']}"
