"""Run the checks that no schema has: the objects of a build must match each other and the code."""

from collections.abc import Iterator, Sequence

from scripts.k8s_check import network, references, scaling, settings, watching
from scripts.k8s_check.build import MONITORED_BUILD, Builds, Manifest
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import containers


def check(builds: Builds) -> Iterator[str]:
    """Yield the findings, each with the name of its build."""
    for build, manifests in builds.items():
        for module in (references, settings, scaling, network):
            for finding in module.check(manifests):
                yield f"{build}: {finding}"
    for finding in watching.check(builds[MONITORED_BUILD]):
        yield f"{MONITORED_BUILD}: {finding}"


def external_secrets(manifests: Sequence[Manifest]) -> set[str]:
    """Return the Secrets that a build requires and does not contain."""
    found = settings.external_secrets(manifests)
    return found.union(*(environment(container, manifests).external for container in containers(manifests)))
