"""Build `deploy/k8s` with Kustomize: every overlay, and prod with each of its optional components."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
"""One Kubernetes object."""

Builds = dict[str, list[Manifest]]
"""The objects of each build by its name, such as `overlays/prod`."""

MONITORED_BUILD = "overlays/dev with monitoring"
"""The build that has everything which can be watched: stub, Redis, proxies, sidecars and augmenters."""


class KustomizeError(Exception):
    """Kustomize rejected a folder."""


def all_builds(deploy: Path) -> Builds:
    """Return all builds. Raises KustomizeError with the message of Kustomize."""
    root = deploy / "k8s"
    builds = {f"overlays/{path.name}": kustomize(path) for path in sorted((root / "overlays").iterdir())}
    components = sorted(path.name for path in (root / "components").iterdir())
    for name in components:
        builds[f"overlays/prod with {name}"] = _with_components(deploy, "prod", [name])
    builds["overlays/prod with all"] = _with_components(deploy, "prod", components)
    if "monitoring" in components:
        builds[MONITORED_BUILD] = _with_components(
            deploy, "dev", components=["redis", "sidecar", "monitoring"]
        )
    return builds


def _with_components(deploy: Path, overlay: str, components: list[str]) -> list[Manifest]:
    """Return an overlay with these components."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "deploy"
        shutil.copytree(deploy, copy)
        path = copy / "k8s" / "overlays" / overlay / "kustomization.yaml"
        edited = yaml.safe_load(path.read_text(encoding="utf-8"))
        edited["components"] = [f"../../components/{name}" for name in components]
        path.write_text(yaml.safe_dump(edited), encoding="utf-8")
        return kustomize(path.parent)


def kustomize(folder: Path) -> list[Manifest]:
    """Return the objects of one folder."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KustomizeError(f"{folder.name}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if manifest]
