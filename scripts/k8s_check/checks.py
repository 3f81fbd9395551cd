"""What no schema knows: that the objects of a build fit each other, and the code."""

from collections.abc import Iterator, Sequence

from scripts.k8s_check import network, references, scaling, settings, watching
from scripts.k8s_check.build import MONITORED_BUILD, Builds, Manifest
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import containers


def check(builds: Builds) -> Iterator[str]:
    """Findings, each with its build before it."""
    for build, manifests in builds.items():
        for module in (references, settings, scaling, network):
            for finding in module.check(manifests):
                yield f"{build}: {finding}"
    for finding in watching.check(builds[MONITORED_BUILD]):
        yield f"{MONITORED_BUILD}: {finding}"


def external_secrets(manifests: Sequence[Manifest]) -> set[str]:
    """What a build takes for granted: Secrets that are made by other means."""
    found = settings.external_secrets(manifests)
    return found.union(*(environment(container, manifests).external for container in containers(manifests)))
