"""Check the maximum number of pods and that one scaler decides it."""

from collections import Counter
from collections.abc import Iterator, Sequence

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import Pod, containers, name_of, of_kind, pods
from scripts.k8s_check.settings import accepted_settings


def check(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the findings of one build."""
    scaled: Counter[str] = Counter()
    workloads = {pod.owner: pod.workload for pod in pods(manifests)}
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        owner = f"{target.get('kind', 'Deployment')}/{target['name']}"
        scaled[owner] += 1
        if owner not in workloads:
            yield f"{name_of(scaler)}: there is no {owner}"
        elif "replicas" in workloads[owner]["spec"]:
            yield f"{owner}: `replicas` would undo what {name_of(scaler)} decided, at every apply"
    for owner, times in scaled.items():
        if times > 1:
            yield f"{owner}: {times} scalers would fight over it"
    yield from _check_triggers(manifests)
    yield from _check_replicas(manifests)


def _check_triggers(manifests: Sequence[Manifest]) -> Iterator[str]:
    for scaler in of_kind(manifests, "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        seen = {
            name: value
            for container in containers(manifests)
            if container.pod.workload["metadata"]["name"] == target
            for name, value in environment(container, manifests).variables.items()
        }
        granted = {found["metadata"]["name"] for found in of_kind(manifests, "TriggerAuthentication")}
        for trigger in scaler["spec"]["triggers"]:
            given = trigger["metadata"]
            for name, variable in given.items():
                if name.endswith("FromEnv") and variable not in seen:
                    yield f"{name_of(scaler)}: {name}: {target} has no variable {variable}"
            if seen.get("AWS_DEFAULT_REGION", given["awsRegion"]) != given["awsRegion"]:
                region = seen["AWS_DEFAULT_REGION"]
                yield f"{name_of(scaler)}: awsRegion is {given['awsRegion']}, AWS_DEFAULT_REGION {region}"
            authentication = trigger.get("authenticationRef", {}).get("name")
            if authentication is not None and authentication not in granted:
                yield f"{name_of(scaler)}: there is no TriggerAuthentication {authentication}"


def _check_replicas(manifests: Sequence[Manifest]) -> Iterator[str]:
    proxies = list(accepted_settings(manifests, "cache-proxy"))
    there_can_be = sum(_max_pods(container.pod, manifests) for container, _ in proxies)
    for container, parsed in proxies:
        expected = parsed.values["expected_replicas"]
        if expected < there_can_be:
            yield (
                f"{container.name}: --expected-replicas {expected}, but there can be {there_can_be} proxies: "
                "without Redis they would pass the model's limit"
            )


def _max_pods(pod: Pod, manifests: Sequence[Manifest]) -> int:
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" == pod.owner:
            surge = pod.workload["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 0)
            return int(scaler["spec"]["maxReplicas"]) + int(surge)
    spec = pod.workload["spec"]
    return int(spec.get("replicas", spec.get("parallelism", 1)))
