"""Ways to look at the objects of a build: by kind, by label, and the containers in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.k8s_check.build import Manifest

_WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob")


@dataclass(frozen=True, kw_only=True)
class Pod:
    """The pods of one workload."""

    workload: Manifest
    owner: str
    labels: Mapping[str, str]
    spec: Manifest

    def containers(self) -> "Iterator[Container]":
        """Yield all containers, including sidecars."""
        for spec in (*self.spec.get("initContainers", ()), *self.spec["containers"]):
            yield Container(pod=self, spec=spec)


@dataclass(frozen=True, kw_only=True)
class Container:
    """One container of a pod."""

    pod: Pod
    spec: Manifest

    @property
    def name(self) -> str:
        """Return the name in findings."""
        return f"{self.pod.owner}/{self.spec['name']}"

    @property
    def program(self) -> str:
        """Return the name of its image without registry and tag."""
        return str(self.spec["image"]).rpartition("/")[2].partition(":")[0].partition("@")[0]

    @property
    def is_sidecar(self) -> bool:
        """Whether it keeps running beside the containers that start after it."""
        return bool(self.spec.get("restartPolicy") == "Always")

    def port(self, wanted: str | int) -> int | None:
        """Return the number of a port given by name or number, or None."""
        for port in self.spec.get("ports", ()):
            if wanted in {port.get("name"), port["containerPort"]}:
                return int(port["containerPort"])
        return None

    def volume_at(self, path: str) -> tuple[Manifest, str] | None:
        """Return the volume that holds `path` and the path inside it, or None."""
        volumes = {volume["name"]: volume for volume in self.pod.spec.get("volumes", ())}
        for mount in self.spec.get("volumeMounts", ()):
            inside = path.removeprefix(mount["mountPath"].rstrip("/") + "/")
            if inside != path and mount["name"] in volumes:
                return volumes[mount["name"]], inside
        return None


def name_of(manifest: Manifest) -> str:
    """Return kind and name."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> Iterator[Manifest]:
    """Yield the objects of some kinds."""
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def by_name(manifests: Sequence[Manifest], kind: str) -> dict[str, Manifest]:
    """Return the objects of a kind by name."""
    return {manifest["metadata"]["name"]: manifest for manifest in of_kind(manifests, kind)}


def pods(manifests: Sequence[Manifest]) -> Iterator[Pod]:
    """Yield the pods of every workload."""
    for workload in of_kind(manifests, *_WORKLOADS):
        spec = workload["spec"]
        template = (
            spec["jobTemplate"]["spec"]["template"] if workload["kind"] == "CronJob" else spec["template"]
        )
        labels = template.get("metadata", {}).get("labels", {})
        yield Pod(workload=workload, owner=name_of(workload), labels=labels, spec=template["spec"])


def containers(manifests: Sequence[Manifest]) -> Iterator[Container]:
    """Yield the containers of every workload."""
    for pod in pods(manifests):
        yield from pod.containers()


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether `matchLabels` and `matchExpressions` match the labels."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _holds(expression, labels) for expression in selector.get("matchExpressions", ())
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Evaluate one of the four operators; the schemas reject any other."""
    found = labels.get(expression["key"])
    if expression["operator"] in {"Exists", "DoesNotExist"}:
        return (found is not None) is (expression["operator"] == "Exists")
    return (found in expression["values"]) is (expression["operator"] == "In")
