"""Check references by name: selectors, ports of Services, service accounts, volumes, images."""

from collections.abc import Iterator, Sequence

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import Container, Pod, by_name, containers, name_of, of_kind, pods, selects


def check(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the findings of one build."""
    for pod in pods(manifests):
        yield from _check_pod(pod, manifests)
        for container in pod.containers():
            yield from (f"{container.name}: {problem}" for problem in _check_container(container, manifests))
    for service in of_kind(manifests, "Service"):
        yield from _check_service(service, manifests)
    for manifest in of_kind(manifests, "PodDisruptionBudget", "NetworkPolicy"):
        spec = manifest["spec"]
        selector = spec["podSelector"] if manifest["kind"] == "NetworkPolicy" else spec["selector"]
        if not any(selects(selector, pod.labels) for pod in pods(manifests)):
            yield f"{name_of(manifest)}: it selects no pods"


def _check_pod(pod: Pod, manifests: Sequence[Manifest]) -> Iterator[str]:
    spec = pod.workload["spec"]
    if "selector" in spec and not selects(spec["selector"], pod.labels):
        yield f"{pod.owner}: its selector does not select its own pods"
    others = [other.owner for other in pods(manifests) if other.owner != pod.owner]
    for other, labels in ((other.owner, other.labels) for other in pods(manifests)):
        if "selector" in spec and other in others and selects(spec["selector"], labels):
            yield f"{pod.owner}: its selector also selects the pods of {other}"
    for spread in pod.spec.get("topologySpreadConstraints", ()):
        if not selects(spread["labelSelector"], pod.labels):
            yield f"{pod.owner}: it spreads over pods that are not its own"
    account = pod.spec.get("serviceAccountName")
    if account and account not in by_name(manifests, "ServiceAccount"):
        yield f"{pod.owner}: there is no ServiceAccount {account}"
    if pod.workload["kind"] == "StatefulSet" and spec["serviceName"] not in by_name(manifests, "Service"):
        yield f"{pod.owner}: there is no Service {spec['serviceName']}"
    for volume in pod.spec.get("volumes", ()):
        name = volume.get("configMap", {}).get("name")
        if name and name not in by_name(manifests, "ConfigMap"):
            yield f"{pod.owner}: there is no ConfigMap {name}"


def _check_container(container: Container, manifests: Sequence[Manifest]) -> Iterator[str]:
    yield from environment(container, manifests).missing
    spec, pod = container.spec, container.pod
    claims = pod.workload["spec"].get("volumeClaimTemplates", ())
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    maps = by_name(manifests, "ConfigMap")
    for mount in spec.get("volumeMounts", ()):
        name = mount["name"]
        if name not in {*volumes, *(claim["metadata"]["name"] for claim in claims)}:
            yield f"there is no volume {name}"
        source = volumes.get(name, {}).get("configMap", {}).get("name")
        if "subPath" in mount and source in maps and mount["subPath"] not in maps[source].get("data", {}):
            yield f"ConfigMap {source} has no {mount['subPath']}"
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        for action in ("httpGet", "tcpSocket"):
            port = spec.get(kind, {}).get(action, {}).get("port")
            if port is not None and container.port(port) is None:
                yield f"{kind}: there is no port {port}"
    tag = spec["image"].rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        yield f"image {spec['image']}: no version says which"


def _check_service(service: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    labels = {"matchLabels": service["spec"]["selector"]}
    found = [container for container in containers(manifests) if selects(labels, container.pod.labels)]
    if not found:
        yield f"{name_of(service)}: it selects no pods"
    for port in service["spec"]["ports"] if found else ():
        wanted = port.get("targetPort", port["port"])
        if not any(container.port(wanted) for container in found):
            yield f"{name_of(service)}: no container has its port {wanted}"
