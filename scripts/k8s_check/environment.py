"""Resolve the environment variables of a container, and find references to objects that do not exist."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.objects import Container, by_name

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_SECRET = "(secret)"  # noqa: S105 - stands for one


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Variables by name. `missing`: sentences about missing objects; `external`: Secrets made elsewhere."""

    variables: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    external: set[str] = field(default_factory=set)

    def expand(self, text: str) -> str:
        """Replace `$(NAME)` as Kubernetes does."""
        return _REFERENCE.sub(lambda found: self.variables.get(found[1], found[0]), text)


def environment(container: Container, manifests: Sequence[Manifest]) -> Environment:
    """Return the environment of a container."""
    maps = {name: found.get("data", {}) for name, found in by_name(manifests, "ConfigMap").items()}
    secrets = {name: found.get("data", {}) for name, found in by_name(manifests, "Secret").items()}
    made = Environment()
    if container.pod.workload["spec"].get("completionMode") == "Indexed":
        made.variables["JOB_COMPLETION_INDEX"] = "0"
    for source in container.spec.get("envFrom", ()):
        name = source["configMapRef"]["name"]
        if name in maps:
            made.variables.update(maps[name])
        else:
            made.missing.append(f"there is no ConfigMap {name}")
    for variable in container.spec.get("env", ()):
        made.variables[variable["name"]] = _value(variable, maps, secrets, made)
    return made


def _value(
    variable: Manifest, maps: Mapping[str, Manifest], secrets: Mapping[str, Manifest], made: Environment
) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return made.expand(str(variable.get("value", "")))
    if wanted := source.get("secretKeyRef"):
        if wanted["name"] not in secrets:
            made.external.add(f"Secret {wanted['name']}: {wanted['key']}")
        elif wanted["key"] not in secrets[wanted["name"]]:
            made.missing.append(f"Secret {wanted['name']} has no {wanted['key']}")
        return _SECRET
    if wanted := source.get("configMapKeyRef"):
        if wanted["key"] not in maps.get(wanted["name"], {}):
            made.missing.append(f"ConfigMap {wanted['name']} has no {wanted['key']}")
        return str(maps.get(wanted["name"], {}).get(wanted["key"], ""))
    # A reference to a field of the pod.
    return "0"


def missing_files(
    container: Container, manifests: Sequence[Manifest], path: str
) -> Iterator[tuple[str, bool]]:
    """Yield the problems of a file that a setting names, and whether it is made elsewhere."""
    found = container.volume_at(path)
    if found is None:
        yield f"nothing is mounted that holds {path}", False
        return
    volume, inside = found
    for kind, source, key in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
        if source in volume:
            name = volume[source][key]
            there = by_name(manifests, kind).get(name)
            if there is None:
                yield f"{kind} {name}: {inside}", kind == "Secret"
            elif inside not in there.get("data", {}):
                yield f"{kind} {name} has no {inside}", False
