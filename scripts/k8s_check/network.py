"""Check that every called address exists and that network policies allow the call."""

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import Container, by_name, of_kind, pods, selects
from scripts.k8s_check.settings import accepted_settings

_GROUP_MAY_OPEN = 0o060
_REDIS_PORT = 6379


def check(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the findings of one build."""
    for container, parsed in accepted_settings(manifests, "cache-proxy"):
        yield from _check_target(container, parsed.values["model_target"], manifests)
        yield from _check_target(container, parsed.values["cache_url"], manifests)
    for container, parsed in accepted_settings(manifests, "augmenter"):
        yield from _check_target(container, parsed.values["target"], manifests)
    for pod in pods(manifests):
        for container in pod.containers():
            if collector := environment(container, manifests).variables.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
                yield from _check_target(container, collector, manifests)
        opened = _open_ports(manifests, "Ingress", pod.labels)
        for container in pod.containers() if opened is not None else ():
            for port in container.spec.get("ports", ()):
                if not {port["containerPort"], port.get("name")} & (opened or set()):
                    yield f"{container.name}: no NetworkPolicy lets anybody in on port {port['name']}"


def _check_target(container: Container, target: str, manifests: Sequence[Manifest]) -> Iterator[str]:
    if target.startswith("unix:"):
        yield from _check_socket(container, target.removeprefix("unix:"), manifests)
        return
    for host, port in _addresses(target):
        service = by_name(manifests, "Service").get(host)
        if "." not in host and service is None:
            yield f"{container.name}: {target}: there is no Service {host}"
        elif service and port not in {one["port"] for one in service["spec"]["ports"]}:
            yield f"{container.name}: {target}: Service {host} has no port {port}"
        opened = _open_ports(manifests, "Egress", container.pod.labels)
        if opened is not None and port not in opened:
            yield f"{container.name}: {target}: no NetworkPolicy lets it out on port {port}"


def _addresses(target: str) -> Iterator[tuple[str, int]]:
    """Yield host and port of a gRPC target (`dns:///host:port`, `host:port`) or a URL with hosts."""
    scheme, slashes, rest = target.partition("://")
    places = (urlsplit(target).netloc if scheme != "dns" else rest.lstrip("/")) if slashes else target
    for place in places.rpartition("@")[2].split(","):
        host, _, port = place.partition(":")
        yield host, int(port or _REDIS_PORT)


def _check_socket(container: Container, path: str, manifests: Sequence[Manifest]) -> Iterator[str]:
    here = container.volume_at(path)
    if here is None:
        yield f"{container.name}: nothing is mounted that holds {path}"
        return
    for other, parsed in accepted_settings(manifests, "cache-proxy"):
        if other.pod.owner == container.pod.owner and other.is_sidecar:
            for listen in parsed.values["listen"]:
                there = other.volume_at(listen.removeprefix("unix:"))
                if there is not None and (there[0]["name"], there[1]) == (here[0]["name"], here[1]):
                    security = container.pod.spec.get("securityContext", {})
                    is_for_group = (parsed.values["listen_mode"] or 0) & _GROUP_MAY_OPEN == _GROUP_MAY_OPEN
                    if "runAsUser" not in security and not ("fsGroup" in security and is_for_group):
                        yield f"{container.name}: without fsGroup in its pod, it may not open the socket"
                    return
    yield f"{container.name}: no sidecar listens on {path}"


def _open_ports(
    manifests: Sequence[Manifest], direction: str, labels: Mapping[str, str]
) -> set[int | str] | None:
    """Return the ports that policies open for these pods, or None if no policy applies."""
    opened: set[int | str] | None = None
    for policy in of_kind(manifests, "NetworkPolicy"):
        spec = policy["spec"]
        if direction in spec["policyTypes"] and selects(spec["podSelector"], labels):
            opened = opened or set()
            for rule in spec.get(direction.lower(), ()):
                opened |= {port["port"] for port in rule["ports"]}
    return opened
